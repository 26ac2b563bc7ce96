"""Where the error is, drawn: by domain, position and layer.

Every plot says with `alt` what it shows; the numbers are in the results, and most in a table of the same page.
"""

from collections.abc import Callable, Sequence

from matplotlib.ticker import FixedLocator, MaxNLocator

from klquant.evaluate.result import LayerDrift, Quality
from klquant.report.comparison import Comparison
from klquant.report.marks import KLD, NARROW, Plot, bars, floor_line, log_ticks, positive, short, style
from klquant.report.svg import FLOOR, INK, RULE, Canvas, draw


def by_domain(c: Comparison) -> list[Plot]:
    """Mean KLD with its range, where it has one: all text, then each domain, on one scale."""
    domains = [None, *c.first.domains] if len(c.first.domains) > 1 else [None]
    shown = [q for d in domains for q in (*_qualities(c, d), c.floor_quality(d)) if q is not None]
    means = [positive(q.kld.mean, c) for q in shown] + [q.kld.low for q in shown if (q.kld.low or 0) > 0]
    limits = min(means) / 1.3, max(q.kld.high or q.kld.mean for q in shown) * 1.3
    return [_dots(c, number, domain, limits) for number, domain in enumerate(domains)]


def _dots(c: Comparison, number: int, domain: str | None, limits: tuple[float, float]) -> Plot:
    def paint(canvas: Canvas) -> None:
        axes = canvas.axes
        floor_line(canvas, c, axes.axvspan, axes.axvline, domain)
        for i, q in enumerate(_qualities(c, domain)):
            mean = positive(q.kld.mean, c)
            if q.kld.low is not None:
                axes.errorbar(mean, i, xerr=bars(q, mean), color=style(c, i)["color"], linewidth=1.6)
            (point,) = axes.plot(mean, i, **style(c, i), markersize=6.5, linestyle="none")
            canvas.tip(point, f"{c.variants[i].name}: KLD {q.kld.mean:.3g}" + _spelt_range(q))
        axes.set(xscale="log", xlim=limits, ylim=(len(c.variants) - 0.4, -0.6), xlabel=KLD)
        axes.yaxis.set_major_locator(FixedLocator(range(len(c.variants))))
        axes.set_yticklabels([short(v.name) for v in c.variants], color=INK)
        axes.grid(False, axis="y")
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        log_ticks(axes.xaxis)

    name = domain or "All text"
    ranges = any(q.kld.low is not None for q in _qualities(c, domain))
    alt = f"Mean KLD{' and 95 % range' if ranges else ''} of each variant, {name}"
    return Plot(name, "", draw(f"domain{number}", alt, NARROW, 62 + 24 * len(c.variants), paint))


def by_position(c: Comparison) -> Plot:
    def paint(canvas: Canvas) -> None:
        if c.floor is not None:
            bins = c.floor.positions
            canvas.axes.plot([(b.start + b.stop) / 2 for b in bins], [positive(b.kld, c) for b in bins],
                             color=FLOOR, dashes=(4, 2))  # fmt: skip
        for i, v in enumerate(c.variants):
            bins = v.result.positions
            (line,) = canvas.axes.plot([(b.start + b.stop) / 2 for b in bins], [positive(b.kld, c) for b in bins],
                                       **style(c, i), markevery=max(1, len(bins) // 5))  # fmt: skip
            canvas.tip(line, v.name)
        canvas.axes.set(yscale="log", xlabel="position in the window, tokens", ylabel=KLD)
        log_ticks(canvas.axes.yaxis)

    caption = "Does it grow with context? The KDA state is read, changed and written at every token."
    return Plot("KLD by position", caption, draw("position", "KLD by position, one line a variant", NARROW, 250, paint))


def by_layer(c: Comparison) -> list[Plot]:
    mla = [row.layer for row in c.first.layers if row.attention == "mla"]
    kinds = f" MLA, shaded: {_ranges(mla)}." if mla else ""
    return [
        _layers(c, "stream", "Drift of the residual stream", "relative difference",
                f"‖model − reference‖ ÷ ‖reference‖ behind each layer.{kinds}", lambda row: row.stream_error, True),
        _layers(c, "state", "Drift of the KDA state", "relative difference",
                f"The state at a window's end. MLA layers have none.{kinds}", lambda row: row.state_error, True),
        _layers(c, "router", "Experts chosen alike", "share of a token's experts",
                "How many of a token's experts the reference's router chose too.", lambda row: row.router_overlap,
                False),
    ]  # fmt: skip


def _layers(
    c: Comparison, name: str, title: str, axis: str, caption: str, value: Callable[[LayerDrift], float | None],
    log: bool,
) -> Plot:  # fmt: skip
    def points(rows: Sequence[LayerDrift]) -> tuple[list[int], list[float]]:
        pairs = [(row.layer, value(row)) for row in rows if value(row) is not None and (value(row) > 0 or not log)]
        return [x for x, _ in pairs], [y for _, y in pairs]

    def paint(canvas: Canvas) -> None:
        axes = canvas.axes
        for row in c.first.layers:
            if row.attention == "mla":
                axes.axvspan(row.layer - 0.5, row.layer + 0.5, color=RULE, alpha=0.45, linewidth=0)
        if c.floor is not None:
            axes.plot(*points(c.floor.layers), color=FLOOR, dashes=(4, 2))
        for i, v in enumerate(c.variants):
            (line,) = axes.plot(*points(v.result.layers), **style(c, i), linewidth=1.3, markersize=4)
            canvas.tip(line, v.name)
        axes.set(xlabel="layer", ylabel=axis, xlim=(-0.5, len(c.first.layers) - 0.5))
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        if log:
            axes.set_yscale("log")
            log_ticks(axes.yaxis)
        else:
            axes.yaxis.set_major_locator(MaxNLocator(6))

    return Plot(title, caption, draw(f"layer-{name}", f"{title}, by layer, one line a variant", NARROW, 250, paint))


def expert_tokens(c: Comparison, index: int) -> Plot | None:
    """The spread of tokens over each layer's experts in calibration, on the evaluated text where nothing was
    calibrated; None for a model without experts."""
    variant = c.variants[index]
    made = variant.result.quantization
    counts = {} if made is None else made.expert_tokens
    where = "in calibration" if counts else "on the evaluated text"
    counts = counts or {row.layer: row.expert_tokens for row in variant.result.layers if row.expert_tokens}
    if not counts:
        return None

    def paint(canvas: Canvas) -> None:
        axes, look = canvas.axes, style(c, index)
        axes.vlines(list(counts), [max(min(n), 0.5) for n in counts.values()], [max(n) for n in counts.values()],
                    color=look["color"], linewidth=1.6)  # fmt: skip
        axes.plot(list(counts), [max(sorted(n)[len(n) // 2], 0.5) for n in counts.values()], **look, linestyle="none")
        axes.set(yscale="log", xlabel="layer", ylabel="tokens an expert")
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        log_ticks(axes.yaxis)

    caption = "From the least to the most used expert of each layer; the mark is the middle one. No token: at 0.5."
    alt = f"Least, middle and most tokens of the experts, by layer, {where}"
    return Plot(f"Tokens an expert got {where}", caption, draw(f"experts{index}", alt, NARROW, 220, paint))


def _qualities(c: Comparison, domain: str | None) -> list[Quality]:
    return [v.result.overall if domain is None else v.result.domains[domain] for v in c.variants]


def _spelt_range(q: Quality) -> str:
    return "" if q.kld.low is None else f" ({q.kld.low:.3g} to {q.kld.high:.3g})"


def _ranges(numbers: list[int]) -> str:
    return f"layer{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"
