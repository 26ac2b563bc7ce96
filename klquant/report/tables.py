"""What the report says in numbers: which variant to take, quality, size."""

from collections.abc import Sequence

from klquant.core.units import decimal, tokens
from klquant.evaluate.result import Interval, MemoryAt, Quality
from klquant.recipe.memory import CARDS
from klquant.report.comparison import Choice, Comparison, Variant
from klquant.report.spell import change, decimals, memory_unit, times
from klquant.report.table import Cell, Row, Table

Unit = tuple[int, str]


def head(comparison: Comparison, variant: Variant) -> Cell:
    return Cell(variant.name, "baseline" if variant.is_baseline else "", series=comparison.variants.index(variant))


def choice_table(c: Comparison) -> Table:
    """For each card and context, the variant to take."""
    places = decimals(v.kld.mean for v in c.variants)
    rows = [
        Row(Cell(_cards(cards)), tuple(_choice(c, choice, places) for choice in choices))
        for cards, choices in c.choices_by_cards()
    ]
    chosen = [choice.memory for _, choices in c.choices_by_cards() for choice in choices if choice.memory is not None]
    note = "The least KLD of what fits" + (
        "; among variants that differ by less than the noise floor, the smallest." if c.floor is not None else "."
    )
    if any(m.cache_bits == 8 for m in chosen):
        note += " † Only with its latent cache in 8 bits and the embedding in host memory; KLD is of a 16-bit cache."
    columns = tuple(f"{tokens(length)} tokens" for length in c.contexts)
    return Table("Which to take", columns, tuple(rows), note, corner="card", text=True)


def summary_table(c: Comparison) -> Table:
    """One line a variant: what it saves and what it costs."""
    places, floor = decimals(_means(c)), c.floor
    columns = ["disk", "KLD", *(["÷ floor"] if floor is not None else []), "same top token", "perplexity",
               "bits a weight"]  # fmt: skip
    rows = []
    for v in c.variants:
        q, size = v.result.overall, v.result.model.size
        cells = [
            Cell(decimal(size.tensors), f"{c.reference.checkpoint.size.tensors / size.tensors:.2f} × less"),
            Cell(f"{q.kld.mean:.{places}f}", half_range(q.kld, places)),
            Cell(share(q.top1.mean, 1), half_range(q.top1, 1, 100)),
            _change(q.perplexity_ratio),
            Cell(f"{size.bits.whole:.2f}"),
        ]
        if floor is not None:
            inside = c.inside_floor(q)
            cells.insert(2, Cell("inside" if inside else times(c.times_floor(q) or 0.0), quiet=inside))
        rows.append(Row(head(c, v), tuple(cells)))
    if floor is not None:
        q = floor.overall
        kld, top1 = Cell(f"{q.kld.mean:.{places}f}", half_range(q.kld, places)), half_range(q.top1, 1, 100)
        cells = (Cell(""), kld, Cell("1"), Cell(share(q.top1.mean, 1), top1), _change(q.perplexity_ratio), Cell(""))
        rows.append(Row(Cell("noise floor"), cells, "floor"))
    return Table("What it saves, what it costs", tuple(columns), tuple(rows), _summary_note(rows), corner="variant")


def quality_table(c: Comparison, domain: str | None) -> Table:
    """All figures of one domain (None: over all)."""
    places = decimals(_means(c, domain))
    columns = (
        "KLD mean", "95 % range", "median", "99 %", "99.9 %", "max", "same top token", "95 % range", "perplexity",
        "change", "95 % range", "÷ floor",
    )  # fmt: skip
    rows = []
    for v in c.variants:
        q = v.result.overall if domain is None else v.result.domains[domain]
        inside = c.inside_floor(q, domain)
        ratio = c.times_floor(q, domain)
        floor = "inside" if inside else "" if ratio is None else times(ratio)
        rows.append(Row(head(c, v), (*_quality(q, places), Cell(floor, quiet=inside))))
    floor = c.floor_quality(domain)
    if floor is not None:
        rows.append(Row(Cell("noise floor"), (*_quality(floor, places), Cell("1")), "floor"))
    q = c.first.overall if domain is None else c.first.domains[domain]
    windows = f"{q.windows} window{'s' * (q.windows != 1)}"
    note = f"{q.positions:,} positions compared, {q.targets:,} next tokens scored, in {windows}."
    if c.reference.store != "full" and (error := max(v.kld.store_error for v in c.variants)) > 0:
        note += (
            f" The reference is kept as top tokens and samples: a mean KLD is off by at most {error:.1g} for it (95 %)."
        )
    return Table(domain or "All text", columns, tuple(rows), note, corner="variant")


def closeness(c: Comparison) -> list[str]:
    """Neighbours that should not be told apart by these results, in words."""
    lines = []
    for better, worse, noise in c.too_close():
        difference = f"{worse.kld.mean - better.kld.mean:.2g}"
        if noise:
            lines.append(f"{better.name} and {worse.name} differ by {difference}: inside the noise floor.")
        else:
            lines.append(
                f"{better.name} and {worse.name} differ by {difference}: their ranges overlap, more windows would tell."
            )
    return lines


def size_table(c: Comparison) -> Table:
    columns = ("disk", "of the reference", "routed experts", "always active", "whole")
    rows = [Row(head(c, v), _size(c, v.result.model.size)) for v in c.variants]
    rows.append(Row(Cell(c.reference.checkpoint.name), _size(c, c.reference.checkpoint.size), "reference"))
    note = (
        "Disk: the tensors, without the headers of files. Bits a weight, with scales and padding. Always active: all "
        "but routed experts and embedding."
    )
    return Table("Disk and bits a weight", columns, tuple(rows), note, corner="variant")


def memory_tables(c: Comparison) -> list[Table]:
    """One a way to run, then how it is made up."""
    unit = memory_unit(max(m.total for v in c.variants for m in v.result.model.size.memory))
    return [
        _memory_table(c, "all on the card, 16-bit cache", 16, unit),
        _memory_table(c, "8-bit cache, embedding in host memory", 8, unit),
        _parts_table(c, unit),
    ]


def _memory_table(c: Comparison, way: str, bits: int, unit: Unit) -> Table:
    columns = tuple(f"{tokens(length)} tokens" for length in c.contexts)
    rows = []
    for v in c.variants:
        cells = [v.memory(length, bits) for length in c.contexts]
        rows.append(Row(head(c, v), tuple(Cell("") if m is None else _memory(m.total, unit, _fits(m)) for m in cells)))
    title = f"Memory to run, {unit[1]}: {way}"
    return Table(title, columns, tuple(rows), "For one sequence; below, the cards that hold it.", corner="variant")


def _parts_table(c: Comparison, unit: Unit) -> Table:
    length = c.plot_context
    columns = ("weights", "latent cache", "KDA state", "workspace ≈", "runtime ≈", "total")
    rows = []
    for v in c.variants:
        if (m := v.memory(length)) is not None:
            parts = (m.weights, m.latent_cache, m.kda_state, m.workspace_estimate, m.runtime_estimate, m.total)
            rows.append(Row(head(c, v), tuple(_memory(part, unit) for part in parts)))
    note = "Weights, cache and state are exact. Workspace (activations) and runtime (context, kernels) are estimates."
    return Table(
        f"What it is made of at {tokens(length)} tokens, {unit[1]}", columns, tuple(rows), note, corner="variant"
    )


def _means(c: Comparison, domain: str | None = None) -> list[float]:
    qualities = [v.result.overall if domain is None else v.result.domains[domain] for v in c.variants]
    floor = c.floor_quality(domain)
    return [q.kld.mean for q in (*qualities, *([floor] if floor else []))]


def _cards(cards: Sequence[str]) -> str:
    return cards[0] if len(cards) == 1 else f"{cards[0].removesuffix(' GB')} – {cards[-1]}"


def _choice(c: Comparison, choice: Choice, places: int) -> Cell:
    if choice.variant is None:
        return Cell("nothing fits" if c.takable else "only baselines here", quiet=True)
    mark = "†" if choice.memory.cache_bits == 8 else ""
    unit = memory_unit(choice.memory.total)
    detail = f"KLD {choice.variant.kld.mean:.{places}f}\n{_memory(choice.memory.total, unit).text} {unit[1]}"
    return Cell(choice.variant.name + mark, detail, series=c.variants.index(choice.variant))


def _quality(q: Quality, places: int) -> tuple[Cell, ...]:
    k = q.kld
    return (
        Cell(f"{k.mean:.{places}f}"), Cell(_range(k, places)), Cell(f"{k.median:.{places}f}"),
        Cell(f"{k.p99:.3f}"), Cell(f"{k.p999:.3f}"), Cell(f"{k.max:.2f}"),
        Cell(share(q.top1.mean, 2)), Cell(_range(q.top1, 1, 100)),
        Cell(f"{q.perplexity:.3f}"), _change(q.perplexity_ratio),
        Cell("" if q.perplexity_ratio.low is None
             else f"{change(q.perplexity_ratio.low)} … {change(q.perplexity_ratio.high)}"),
    )  # fmt: skip


def _size(c: Comparison, size) -> tuple[Cell, ...]:
    bits = size.bits
    share = Cell(f"{100 * size.tensors / c.reference.checkpoint.size.tensors:.1f} %")
    return (Cell(decimal(size.tensors)), share, *(Cell(f"{b:.2f}") for b in (bits.routed_experts, bits.always_active,
                                                                       bits.whole)))  # fmt: skip


def _change(ratio: Interval) -> Cell:
    """Quiet, with "≈", where no change lies in the range."""
    unclear = ratio.low is not None and ratio.low <= 1 <= ratio.high
    return Cell("≈ " * unclear + change(ratio.mean), quiet=unclear)


def _summary_note(rows: Sequence[Row]) -> str:
    """What the signs mean that are there."""
    cells = [cell for row in rows for cell in row.cells]
    ranges = "± is half the 95 % range, by bootstrap over windows." if any("±" in c.detail for c in cells) else ""
    unclear = "≈: a change of perplexity whose range includes zero." if any("≈" in c.text for c in cells) else ""
    return f"{ranges} {unclear}".strip()


def share(share: float, places: int) -> str:
    return f"{100 * share:.{places}f} %"


def half_range(x: Interval, places: int, scale: float = 1) -> str:
    return "" if x.low is None else f"± {scale * (x.high - x.low) / 2:.{places}f}"


def _range(x: Interval, places: int, scale: float = 1) -> str:
    return "" if x.low is None else f"{scale * x.low:.{places}f} – {scale * x.high:.{places}f}"


def _fits(memory: MemoryAt) -> str:
    if len(memory.fits) in (0, len(CARDS)):
        return "all cards" if memory.fits else "none"
    return ", ".join(card.removesuffix(" GB") for card in memory.fits) + " GB"


def _memory(nbytes: int, unit: Unit, detail: str = "") -> Cell:
    value = nbytes / unit[0]
    return Cell(f"{value:.1f}" if value >= 10 else f"{value:.2f}", detail)
