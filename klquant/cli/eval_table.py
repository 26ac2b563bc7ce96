"""What `klquant eval` shows: progress while it works, one small table when it is done."""

import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from klquant.cli.render import console, print_table
from klquant.core.units import decimal
from klquant.evaluate.result import Interval, Quality, Result
from klquant.evaluate.tasks.record import TaskScore


class Bar:
    """A watcher that draws on stderr: a bar with the time left; on a pipe, a line for each stage."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn(),
            console=self.console, disable=not self.console.is_terminal, transient=True,
        )  # fmt: skip
        self.task: TaskID | None = None
        self.stage, self.started = "", 0.0

    def __enter__(self) -> "Bar":
        self.progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.progress.stop()
        self._finish()
        if kind is KeyboardInterrupt:
            self.console.print("Finished windows are kept: the same command goes on from here.")

    def begin(self, stage: str, total: int) -> None:
        self._finish()
        self.stage, self.started = stage, time.monotonic()
        if self.task is not None:
            self.progress.remove_task(self.task)
        self.task = self.progress.add_task(stage, total=total)

    def advance(self, work: int) -> None:
        self.progress.advance(self.task, work)

    def note(self, text: str) -> None:
        self.console.print(Text(f"note: {text}", style="yellow"))

    def _finish(self) -> None:
        if self.stage:
            self.console.print(Text(f"{self.stage}: {time.monotonic() - self.started:.0f} s", style="dim"))
        self.stage = ""


def print_result(result: Result, path: Path) -> None:
    """Size, then quality by domain, in at most 80 columns."""
    out, size, bits = console(), result.model.size, result.model.size.bits
    out.print(Text(result.model.name, style="bold", overflow="fold"))
    line = f"{decimal(size.tensors)}, {bits.whole:.2f} bits a weight (routed {bits.routed_experts:.2f}, "
    out.print(Text(f"{line}always active {bits.always_active:.2f})", style="dim"))
    if result.reference is not None:
        out.print(Text(
            f"against {result.reference.checkpoint.name}, {result.reference.arithmetic.dtype} on "
            f"{result.reference.arithmetic.device}", style="dim", overflow="fold"))  # fmt: skip
    out.print()
    print_table(out, _table(result))
    if result.reference is not None:
        out.print(Text("KLD in nats a token; ± 95 % over windows.", style="dim"))
    if result.tasks:
        out.print()
        print_table(out, _task_table(result.tasks))
        out.print(Text("± one standard error; of a change, that of the items' differences.", style="dim"))
    out.print(Text(f"{result.overall.positions:,} tokens; result in {path}", style="dim", overflow="fold"))


def _table(result: Result) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("", no_wrap=True)
    compared = result.reference is not None
    names = ("KLD", "±", "99 %", "top-1 same", "perplexity", "change") if compared else ("perplexity",)
    for name in ("tokens", *names):
        table.add_column(name, justify="right", no_wrap=True)
    for name, q in result.domains.items():
        table.add_row(name, *_cells(q))
    table.add_row("all", *_cells(result.overall), style="bold")
    if result.floor is not None:
        table.add_row("floor", *_cells(result.floor.overall), style="dim")
    return table


def _task_table(tasks: list[TaskScore]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("task")
    compared = tasks[0].reference is not None
    names = ("items", "score", "±", "chance", *(("reference", "change", "±") if compared else ()))
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for t in tasks:
        cells = [f"{t.task} {t.metric}", f"{t.items:,}", f"{t.value:.4f}", _error(t.standard_error),
                 "" if t.chance is None else f"{t.chance:.3f}"]  # fmt: skip
        if compared:
            cells += [f"{t.reference.value:.4f}", f"{t.difference.mean:+.4f}", _error(t.difference.standard_error)]
        table.add_row(*cells)
    return table


def _error(x: float | None) -> str:
    return "" if x is None else f"{x:.4f}"


def _cells(q: Quality) -> list[str]:
    first, perplexity = f"{q.positions:,}", f"{q.perplexity:.2f}"
    if q.kld is None:
        return [first, perplexity]
    change = f"{100 * (q.perplexity_ratio.mean - 1):+.2f} %"
    return [first, f"{q.kld.mean:.4f}", _half(q.kld), f"{q.kld.p99:.3f}", f"{q.top1.mean:.1%}", perplexity, change]


def _half(x: Interval) -> str:
    return "" if x.low is None else f"{(x.high - x.low) / 2:.4f}"
