"""What a run tells whoever watches it. The CLI draws it; a library user can ignore it or listen."""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class UnitDone:
    """A finished unit: its name, the bytes written, the error of its weights (mean and worst, with the tensor's name)
    and the fallbacks it took."""

    name: str
    nbytes: int
    mean_error: float | None
    worst_error: float | None
    worst_tensor: str | None
    fallbacks: list[str]


@dataclass(frozen=True)
class Traffic:
    """Bytes of weights read and of shards written, and the seconds that the work stood still for either."""

    read: int
    read_wait: float
    written: int
    write_wait: float


class Watcher(Protocol):
    """Called in order: `begin`, for each unit `phase` any number of times and `done`, then `end`; `note` at any time.

    `done` comes when the unit is safe on the disk, from another thread, while the next unit is at work.
    """

    def begin(self, units: list[str], finished: int) -> None: ...

    def phase(self, unit: str, phase: str, fraction: float) -> None: ...

    def done(self, unit: UnitDone) -> None: ...

    def end(self, traffic: Traffic) -> None: ...

    def note(self, text: str) -> None: ...


class Silent:
    """A watcher that does not look."""

    def begin(self, units: list[str], finished: int) -> None:
        pass

    def phase(self, unit: str, phase: str, fraction: float) -> None:
        pass

    def done(self, unit: UnitDone) -> None:
        pass

    def end(self, traffic: Traffic) -> None:
        pass

    def note(self, text: str) -> None:
        pass
