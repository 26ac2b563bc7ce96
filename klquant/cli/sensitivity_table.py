"""What `klquant sensitivity` shows when it is done."""

from pathlib import Path

from rich.table import Table
from rich.text import Text

from klquant.cli.render import console, count, print_table
from klquant.core.units import decimal
from klquant.evaluate.result import Quality
from klquant.evaluate.sensitivity_result import Entry, Sensitivity


def print_sensitivity(result: Sensitivity, path: Path) -> None:
    """One line a part, in at most 80 columns."""
    out, made = console(), result.quantizer
    how = "rounded to nearest on the grids of" if made.method == "rtn" else "as in"
    out.print(Text(result.reference.checkpoint.name, style="bold", overflow="fold"))
    out.print(Text(f"with one part quantized, {how} {made.name}; all else in 16 bits", style="dim", overflow="fold"))
    out.print()
    print_table(out, _table(result))
    out.print(Text(
        "KLD in nats a token; ± 95 % over windows. Saved: bytes less than in 16 bits.", style="dim"))  # fmt: skip
    if result.left_out:
        text = f"no time was left for: {', '.join(result.left_out)}. The same command goes on."
        out.print(Text(text, style="yellow", overflow="fold"))
    if result.entries:
        positions = result.entries[0].overall.positions
        out.print(Text(f"{positions:,} tokens; result in {path}", style="dim", overflow="fold"))


def _table(result: Sensitivity) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("", no_wrap=True)
    for name in ("grid", "weights", "saved", "KLD", "±", "top-1 same"):
        table.add_column(name, justify="right", no_wrap=True)
    for entry in result.ranked:
        table.add_row(entry.part.name.replace("_", " "), *_cells(entry), style="bold" if entry.part.is_whole else "")
    if result.floor is not None:
        q = result.floor.overall
        cells = ["", "", "", *_quality(q)]
        table.add_row("floor", *cells, style="dim")
    return table


def _cells(entry: Entry) -> list[str]:
    part = entry.part
    grid = next(iter(part.scheme)) if len(part.scheme) == 1 else ""
    return [grid, count(part.weights), decimal(part.bytes_before - part.bytes_after), *_quality(entry.overall)]


def _quality(q: Quality) -> list[str]:
    half = "" if q.kld.low is None else f"{(q.kld.high - q.kld.low) / 2:.5f}"
    return [f"{q.kld.mean:.5f}", half, f"{q.top1.mean:.1%}"]
