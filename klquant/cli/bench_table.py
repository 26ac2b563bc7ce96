"""What `klquant bench` shows: what it is doing, then tables."""

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from klquant.cli.render import console, new_table, section
from klquant.core.units import decimal, tokens
from klquant.recipe.memory import GIB

if TYPE_CHECKING:
    from klquant.cli.bench_run import Bench

NO_ROOM = Text("does not fit", style="dim")
PART_NAMES = {"latent_cache": "latent cache", "kda_state": "KDA state"}


class Notes:
    """A line on stderr that says what is being done, and notes that stay."""

    def __init__(self, quiet: bool) -> None:
        self.console = Console(stderr=True, highlight=False)
        self._status = self.console.status("planning") if self.console.is_terminal and not quiet else None

    def __enter__(self) -> "Notes":
        if self._status:
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._status:
            self._status.stop()

    def status(self, text: str) -> None:
        if self._status:
            self._status.update(text)

    def progress(self, done: int, total: int) -> None:
        self.status(f"loading {decimal(done)} of {decimal(total)}")

    def note(self, text: str) -> None:
        self.console.print(Text(f"note: {text}", style="yellow"), soft_wrap=True)


def print_bench(result: "Bench") -> None:
    out = console()
    out.print(Text(result.model, style="bold", overflow="fold"))
    recipe = f"recipe {result.recipe}, random weights, " if result.recipe else ""
    out.print(Text(f"{recipe}{result.dtype} activations, {result.cache_bits}-bit latent cache", style="dim"))
    for name in result.devices:
        out.print(Text(name, style="dim"))
    copy = decimal(int(result.ceilings.copy_bytes_s))
    out.print(Text(f"loaded in {result.load_s:.1f} s; a large copy moves {copy} a second", style="dim"))
    for text in result.notes:
        out.print(Text(f"note: {text}", style="yellow"))
    if result.prefill:
        section(out, "Prefill", _prefill_table(result))
    if result.decode:
        section(out, "Decode", _decode_table(result))
    section(out, "Memory, GiB", _memory_table(result))
    if (launches := result.ceilings.launches) is not None:
        out.print()
        out.print(Text(
            "RTX 4090: a prediction from what was measured here, not a measurement. Bytes at 1,008 GB/s and the share "
            f"of the bandwidth reached here, and {launches} launches of {result.ceilings.launch_s * 1e6:.1f} µs.",
            style="dim"))  # fmt: skip


def _prefill_table(result: "Bench") -> Table:
    rows = _columns("prompt", "first token, ms", "tokens/s")
    for n, p in result.prefill.items():
        cells = [f"{p.first_token_s * 1e3:,.0f}", f"{p.tokens_s:,.0f}"] if p else [NO_ROOM]
        rows.add_row(tokens(n), *cells)
    return rows


def _decode_table(result: "Bench") -> Table:
    from klquant.cli.bench_run import predicted_tokens_s

    predicted = ["RTX 4090\npredicted"] if result.ceilings.launches else []
    aside = ["experts not\non the GPU"] if any(row and row.offloaded for row in result.decode.values()) else []
    rows = _columns("context", "batch", "step, ms", "tokens/s", "moved", "of copy", *predicted, *aside)
    for (context, batch), row in result.decode.items():
        if row is None:
            rows.add_row(tokens(context), str(batch), NO_ROOM)
            continue
        cells = [f"{row.step_s * 1e3:.2f}", f"{row.tokens_s:,.0f}", decimal(row.traffic.total)]
        cells.append(f"{row.bytes_s / result.ceilings.copy_bytes_s:.0%}")
        card = predicted_tokens_s(result.ceilings, row)
        found = row.offloaded
        of_chosen = [f"{found.missing / max(1, found.chosen):.1%}"] if found else []
        rows.add_row(tokens(context), str(batch), *cells, *([f"{card:,.0f}"] if card else []), *of_chosen)
    return rows


def _memory_table(result: "Bench") -> Table:
    rows = _columns("device", "part", "predicted", "actual")
    for device in dict.fromkeys(u.device for u in result.usage):
        mine = [u for u in result.usage if u.device == device]
        for u in mine:
            rows.add_row(str(device), PART_NAMES.get(u.part, u.part), *_amounts(u.predicted, u.actual))
        if all(u.actual is not None for u in mine):
            rows.add_row(str(device), "all", *_amounts(sum(u.predicted for u in mine), sum(u.actual for u in mine)))
    return rows


def _amounts(predicted: int, actual: int | None) -> tuple[str, str]:
    return f"{predicted / GIB:.3f}", "" if actual is None else f"{actual / GIB:.3f}"


def _columns(*names: str) -> Table:
    rows = new_table()
    for i, name in enumerate(names):
        rows.add_column(name, justify="left" if i == 0 or name == "part" else "right", no_wrap=True)
    return rows
