"""What `klquant quantize` shows while it works: a line for each finished unit and, on a terminal, a live view below."""

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from klquant.cli.pace import Pace, Work
from klquant.cli.spell import about, duration, place
from klquant.core.memory import resident_memory
from klquant.core.units import decimal, percent
from klquant.pipeline.report import Traffic, UnitDone

HEADER = f"{'unit':<10}{'time':>12}{'error':>11}{'worst':>11}{'memory':>10}  in"


class Lines:
    """A watcher that prints: one line a unit, notes and fallbacks as they come. For pipes and logs.

    `works`: what each unit has to do. Memory is this process's on the host.
    """

    def __init__(self, out: Console, works: dict[str, Work]) -> None:
        self.out, self.pace = out, Pace(works)
        self.unit, self.activity, self.fraction = "", "", 0.0
        self.fallbacks = 0
        self.traffic: Traffic | None = None
        self._errors, self._tensors = 0.0, 0

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *_) -> None:
        pass

    def begin(self, units: list[str], finished: int) -> None:
        self.pace.begin(finished)
        if finished:
            self._print(Text(f"going on: {finished} of {len(units)} units are done already", style="dim"))
        self._print(Text(HEADER, style="dim"))

    def phase(self, unit: str, phase: str, fraction: float) -> None:
        if unit not in self.pace.works and (unit, phase) != (self.unit, self.activity):
            self.before(unit, phase)
        self.unit, self.activity, self.fraction = unit, phase, fraction
        self.pace.enter(unit)

    def before(self, what: str, phase: str) -> None:
        """Something that comes before the first unit has begun."""
        self._print(Text(f"{what}: {phase}", style="dim"))

    def done(self, unit: UnitDone) -> None:
        took = self.pace.leave(unit.name)
        tensors = self.pace.works[unit.name].tensors
        if unit.mean_error is not None:
            self._errors += unit.mean_error * tensors
            self._tensors += tensors
        self.fallbacks += len(unit.fallbacks)
        self._print(_row(unit, took))
        for fallback in unit.fallbacks[:1]:
            more = f" (and {len(unit.fallbacks) - 1} more)" if len(unit.fallbacks) > 1 else ""
            self._print(Text(f"  fallback: {fallback}{more}", style="yellow"), wrap=True)

    def end(self, traffic: Traffic) -> None:
        self.traffic = traffic

    def note(self, text: str) -> None:
        self._print(Text(f"note: {text}", style="dim"), wrap=True)

    @property
    def mean_error(self) -> float | None:
        """Mean relative error of the tensors quantized so far."""
        return self._errors / self._tensors if self._tensors else None

    def _print(self, text: Text, wrap: bool = False) -> None:
        if not self.out.is_terminal:
            self.out.print(text, soft_wrap=True)
        elif wrap:
            self.out.print(text)
        else:
            self.out.print(text, no_wrap=True, overflow="ellipsis")


class View(Lines):
    """The same on a terminal, with the unit at work, progress, time left, memory and error in live lines below."""

    def __init__(self, out: Console, works: dict[str, Work]) -> None:
        super().__init__(out, works)
        self._live = Live(self, console=out, refresh_per_second=4, transient=True)
        self._begun = False

    def __enter__(self) -> "View":
        self._live.start()
        return self

    def __exit__(self, *_) -> None:
        self._live.stop()

    def begin(self, units: list[str], finished: int) -> None:
        super().begin(units, finished)
        self._begun = True

    def before(self, what: str, phase: str) -> None:
        pass  # the live view shows it

    def __rich__(self) -> Group:
        share = self.pace.share if self._begun else self.fraction
        units = f"{self.pace.done} of {len(self.pace.works)} units" if self._begun else "before the first unit"
        return Group(
            Text(),
            _apart(self._at_work(), Text(units, style="dim")),
            _apart(ProgressBar(total=1, completed=share), Text(f"{100 * share:3.0f} %")),
            Text(" · ".join(self._time()), style="dim", no_wrap=True, overflow="ellipsis"),
            Text(" · ".join(self._result()), style="dim", no_wrap=True, overflow="ellipsis"),
        )

    def _at_work(self) -> Text:
        if self._begun and self.pace.done == len(self.pace.works):
            return Text("finishing", style="bold")
        return Text.assemble((self.unit, "bold"), f"  {self.activity}")

    def _time(self) -> list[str]:
        left = self.pace.left if self._begun else None
        gone = self.pace.gone
        parts = [f"{duration(gone)} gone" if gone < 100 else f"{about(gone)} gone"]
        parts.append(
            "time left not known yet" if left is None else f"about {about(left)} left" if left else "done soon"
        )
        parts.append(f"{decimal(resident_memory())} RAM")
        if peak := cuda_peak():
            parts.append(f"{decimal(peak)} CUDA at most")
        return parts

    def _result(self) -> list[str]:
        works = list(self.pace.works.values())
        parts = [f"{decimal(sum(w.nbytes for w in works[: self.pace.done]))} written"]
        if self.mean_error is not None:
            parts.append(f"mean error {percent(self.mean_error)}")
        parts.append(f"{self.fallbacks or 'no'} fallback{'s' * (self.fallbacks != 1)}")
        return parts


def watcher(out: Console, works: dict[str, Work]) -> Lines:
    """A live view where `out` is a terminal, plain lines elsewhere."""
    return View(out, works) if out.is_terminal and not out.is_dumb_terminal else Lines(out, works)


def _apart(left, right: Text) -> Table:
    """A line with `left` taking all the room that `right` leaves."""
    line = Table.grid(expand=True, padding=(0, 1))
    line.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    line.add_column(justify="right", no_wrap=True)
    line.add_row(left, right)
    return line


def _row(unit: UnitDone, took: float) -> Text:
    mean, worst, where = "", "", ""
    if unit.mean_error is not None:
        mean, worst, where = percent(unit.mean_error), percent(unit.worst_error), place(unit.worst_tensor)[1]
    row = Text(f"{unit.name:<10}{duration(took):>12}")
    row.append(f"{mean:>11}").append(f"{worst:>11}")
    return row.append(f"{decimal(resident_memory()):>10}  {where}".rstrip(), style="dim")


def cuda_peak() -> int:
    """Bytes of CUDA memory that tensors took at most, over all devices in use; 0 without CUDA."""
    if not torch.cuda.is_initialized():
        return 0
    return max(torch.cuda.max_memory_allocated(device) for device in range(torch.cuda.device_count()))
