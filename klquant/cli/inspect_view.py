"""The findings of `klquant inspect` for the terminal."""

from statistics import median

from rich.console import Console
from rich.table import Table
from rich.text import Text

from klquant.checkpoint.names import TensorClass
from klquant.cli.findings import QUANTILES, Findings, group, mean_error, quantiles, worst
from klquant.cli.inspect import WORST, fallbacks
from klquant.cli.render import count, new_table, section
from klquant.cli.spell import place
from klquant.core.units import decimal, percent, some

# A mean error this many times its column's median stands out, and how.
HIGH, VERY_HIGH = 1.4, 2.0
FEWEST = 8


def print_findings(out: Console, found: Findings, one_layer: bool, one_class: bool) -> None:
    """In the order a reader asks: what is it, how small, where is the error, what did the experts see."""
    _print_head(out, found)
    section(out, "Stored", _stored(found, by_role=one_layer or one_class))
    if found.missing:
        out.print(Text(f"{found.missing:,} tensors are missing: klquant verify names them", style="bold red"))
    if found.measured:
        kind = "output" if any(t.record.measured == "outputs" for t in found.measured) else "own"
        title = f"Error: share of a weight's {kind} energy that was lost, in %"
        section(out, title, _roles(found) if one_layer else _heat(found, by_role=one_class))
        section(out, "Worst tensors", _worst(found))
    if found.experts:
        section(out, "Calibration tokens that experts saw", _experts(found))
        for layer, counts in found.experts.items() if one_layer else ():
            fewest = sorted(range(len(counts)), key=lambda e: counts[e])
            text = some([f"{e} ({counts[e]:,})" for e in fewest], FEWEST)
            out.print(Text(f"layer {layer}, expert (tokens): {text}", style="dim"))
    _print_fallbacks(out, found)


def _print_head(out: Console, found: Findings) -> None:
    weights, nbytes = sum(t.weights for t in found.tensors), sum(t.nbytes for t in found.tensors)
    out.print(Text(str(found.folder), style="bold", overflow="fold"))
    out.print(Text(f"{count(weights)} weights, {decimal(nbytes)}, {8 * nbytes / weights:.3f} bits a weight"))
    p = found.provenance
    if p is None:
        out.print(Text("no klquant.json: how it was made and what it cost is not known", style="dim"))
        return
    made = [f"klquant {p.versions.get('klquant', '?')}", f"recipe {p.recipe.get('name', '?')}", f"target {p.target}"]
    made += [f"{name} {version}" for name, version in p.versions.items() if name in ("torch", "compressed-tensors")]
    out.print(Text(" · ".join(made), style="dim"))
    if (c := p.calibration) is not None:
        sources = ", ".join(f"{s.name} {s.windows}" for s in c.sources)
        tokens = f"{c.windows * c.window:,} tokens: {c.windows:,} window{'s' * (c.windows > 1)} of {c.window:,}"
        out.print(Text(f"calibrated on {tokens} ({sources})", style="dim"))
    for change in p.changes:
        what = f"{change.cls} {', '.join(change.roles)}: {change.count} tensors kept"
        out.print(Text(f"for {p.target} {what}. {change.why}.", style="dim"))


def _stored(found: Findings, by_role: bool) -> Table:
    table = new_table()
    table.show_footer = True
    nbytes, weights = sum(t.nbytes for t in found.tensors), sum(t.weights for t in found.tensors)
    table.add_column("class", "all", no_wrap=True)
    table.add_column("count", f"{len(found.tensors):,}", justify="right", no_wrap=True)
    table.add_column("as", no_wrap=True)
    table.add_column("bits", f"{8 * nbytes / weights:.3f}", justify="right", no_wrap=True)
    table.add_column("weights", count(weights), justify="right", no_wrap=True)
    table.add_column("size", decimal(nbytes), justify="right", no_wrap=True)
    if not by_role:
        table.add_column("share", justify="right", no_wrap=True)
    parts = group(found.tensors, "cls", "role", "stored") if by_role else group(found.tensors, "cls", "stored")
    order = list(TensorClass)
    for name, part in sorted(parts.items(), key=lambda item: order.index(item[0][0])):
        part_bytes, part_weights = sum(t.nbytes for t in part), sum(t.weights for t in part)
        cells = [
            " ".join(name[:-1]), f"{len(part):,}", name[-1], f"{8 * part_bytes / part_weights:.3f}",
            count(part_weights), decimal(part_bytes),
        ]  # fmt: skip
        cells += [] if by_role else [f"{100 * part_bytes / nbytes:.1f} %"]
        table.add_row(*cells, style="" if part[0].quantized else "dim")
    return table


def _heat(found: Findings, by_role: bool) -> Table:
    """Mean error by layer and class (or role); what stands out in its column is coloured and marked."""
    part = "role" if by_role else "cls"
    columns = [name for (name,) in group(found.measured, part)]
    if not by_role:
        columns.sort(key=list(TensorClass).index)
    cells = {at: mean_error(tensors) for at, tensors in group(found.measured, "layer", part).items()}
    middle = {c: median(e for (_, column), e in cells.items() if column == c) for c in columns}
    table = new_table()
    table.add_column("layer", justify="right", no_wrap=True)
    table.add_column("")
    for column in columns:
        table.add_column(column.replace("_", "\n"), justify="right", no_wrap=True)
    for layer in dict.fromkeys(layer for layer, _ in cells):
        kind = "end" if layer is None else "MLA" if found.config.is_mla(layer) else "KDA"
        row = (_cell(cells.get((layer, c)), middle[c]) for c in columns)
        table.add_row("" if layer is None else str(layer), Text(kind, style="dim"), *row)
    table.add_section()
    means = [mean_error(tensors) for c in columns for tensors in [group(found.measured, part)[(c,)]]]
    table.add_row("mean", "", *map(_number, means), style="bold")
    if any(e >= VERY_HIGH * middle[c] for (_, c), e in cells.items()):
        table.caption = f"▲ {VERY_HIGH:g} times the median of its column or more"
        table.caption_justify = "left"
    return table


def _cell(error: float | None, middle: float) -> Text:
    if error is None:
        return Text("")
    if error >= VERY_HIGH * middle:
        return Text(f"▲ {_number(error)}", style="bold red")
    return Text(_number(error), style="yellow" if error >= HIGH * middle else "")


def _roles(found: Findings) -> Table:
    """One layer, role by role."""
    table = new_table()
    for name in ("class", "role"):
        table.add_column(name, no_wrap=True)
    for name in ("tensors", "mean", "worst"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("in", no_wrap=True, overflow="ellipsis")
    for (cls, role), part in group(found.measured, "cls", "role").items():
        top = worst(part)
        where = place(top.key.module)[1] if len(part) > 1 else ""
        table.add_row(cls, role, f"{len(part):,}", _number(mean_error(part)), _number(top.record.error), where)
    return table


def _worst(found: Findings) -> Table:
    table = new_table()
    table.add_column("error", justify="right", no_wrap=True)
    for name in ("layer", "tensor"):
        table.add_column(name, no_wrap=True)
    table.add_column("as", no_wrap=True)
    table.add_column("tokens", justify="right", no_wrap=True)
    for t in sorted(found.measured, key=lambda t: -t.record.error)[:WORST]:
        layer, name = place(t.key.module)
        tokens = "" if t.record.tokens is None else f"{t.record.tokens:,}"
        how = f"{t.stored} {t.record.algorithm.upper()}"
        table.add_row(percent(t.record.error), layer.removeprefix("layer "), name, how, tokens)
    return table


def _experts(found: Findings) -> Table:
    table = new_table()
    table.add_column("layer", justify="right", no_wrap=True)
    labels = {"p1": "1 %", "p10": "10 %", "p90": "90 %"}
    for name in ("none", *QUANTILES):
        table.add_column(labels.get(name, name), justify="right", no_wrap=True)
    for layer, counts in found.experts.items():
        row = quantiles(counts)
        none = Text(f"{row.pop('none'):,}")
        none.stylize("bold red" if none.plain != "0" else "dim")
        table.add_row(str(layer), none, *(f"{n:,}" for n in row.values()))
    return table


def _print_fallbacks(out: Console, found: Findings) -> None:
    taken = fallbacks(found)
    if taken:
        out.print()
        out.print(Text(f"Fallbacks: {len(taken):,}", style="bold yellow"))
        for line in taken[:WORST]:
            out.print(Text(f"  {line}"))
        if len(taken) > WORST:
            out.print(Text(f"  and {len(taken) - WORST:,} more: --json lists them", style="dim"))
    elif found.measured:
        out.print()
        out.print(Text("No fallbacks.", style="dim"))


def _number(error: float) -> str:
    return percent(error).removesuffix(" %")
