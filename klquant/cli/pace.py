"""How far a run is, and how long it will still take: units of one kind take equally long.

A unit's kind is the set of shapes and grids of its tensors, so that layers that are alike (KDA with experts, MLA with
experts, a dense layer) are one kind. Of a kind not met yet the time is guessed from units that have about as much to
do, and from all units where there are none.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from klquant.recipe.decision import Decision

# Units whose costs differ by less than this factor are about equal.
SIMILAR = 2.0
# Share of the work that is left for which an equal or similar unit must be done before a guess is worth showing.
KNOWN = 0.8


@dataclass(frozen=True)
class Work:
    """What a unit has to do: its kind, weights to quantize, all weights, tensors to quantize, bytes to write."""

    kind: frozenset
    quantized: int
    weights: int
    tensors: int
    nbytes: int

    @classmethod
    def of(cls, decisions: list[Decision]) -> "Work":
        wanted = [d for d in decisions if d.spec is not None]
        return cls(
            kind=frozenset((d.key.role, d.shape, str(d.spec), d.algorithm) for d in decisions),
            quantized=sum(d.weights for d in wanted),
            weights=sum(d.weights for d in decisions),
            tensors=len(wanted),
            nbytes=sum(d.bytes_after for d in decisions),
        )

    @property
    def cost(self) -> float:
        """In no unit; a weight that is only copied is cheap."""
        return self.quantized + 0.02 * self.weights


class Pace:
    """Times of a run's units; `works` are all of them, in order."""

    def __init__(self, works: dict[str, Work], clock: Callable[[], float] = time.monotonic) -> None:
        self.works, self.clock = works, clock
        self.seconds: dict[str, float] = {}
        self.current: str | None = None
        self._left = list(works)
        self._first = self._started = self._ended = clock()
        self._begins: dict[str, float] = {}

    def begin(self, finished: int) -> None:
        """The first `finished` units were done by an earlier run; of their times nothing is known."""
        self._left = list(self.works)[finished:]

    @property
    def gone(self) -> float:
        """Seconds since this process began."""
        return self.clock() - self._first

    def enter(self, unit: str) -> None:
        """The unit begins, unless it has begun before."""
        if unit in self.works and unit not in self._begins:
            self.current = unit
            self._begins[unit] = self._started = self.clock()

    def leave(self, unit: str) -> float:
        """The unit is done; returns the seconds it took. Another may have begun: time that both took counts once."""
        self.enter(unit)
        now = self.clock()
        took = now - max(self._begins[unit], self._ended)
        self.seconds[unit], self._ended = took, now
        self._left.remove(unit)
        if self.current == unit:
            self.current = None
        return took

    @property
    def done(self) -> int:
        return len(self.works) - len(self._left)

    @property
    def share(self) -> float:
        """How much of the whole run is done, 0 to 1."""
        total = sum(w.cost for w in self.works.values())
        done = total - sum(self.works[unit].cost for unit in self._left)
        if self.current is not None and (expected := self._expected(self.current)):
            within = min(0.95, (self.clock() - self._started) / expected)
            done += within * self.works[self.current].cost
        return done / total

    @property
    def left(self) -> float | None:
        """Seconds to the end, None as long as too little is known."""
        rest = sum(self.works[unit].cost for unit in self._left)
        known = sum(self.works[unit].cost for unit in self._left if self._alike(unit) or self._similar(unit))
        if known < KNOWN * rest:
            return None
        seconds = sum(self._expected(unit) for unit in self._left)
        if self.current is not None:
            seconds -= min(self.clock() - self._started, 0.95 * self._expected(self.current))
        return seconds

    def _expected(self, unit: str) -> float:
        """Seconds a unit takes: the mean of its kind, else by the cost of other units; 0 while nothing is known."""
        if alike := self._alike(unit):
            return sum(self.seconds[name] for name in alike) / len(alike)
        others = self._similar(unit) or [name for name in self.seconds if self.works[name].quantized]
        if not others or not self.works[unit].quantized:
            return 0.0
        rate = sum(self.seconds[name] for name in others) / sum(self.works[name].cost for name in others)
        return rate * self.works[unit].cost

    def _alike(self, unit: str) -> list[str]:
        return [name for name in self.seconds if self.works[name].kind == self.works[unit].kind]

    def _similar(self, unit: str) -> list[str]:
        cost = self.works[unit].cost
        return [name for name in self.seconds if cost / SIMILAR < self.works[name].cost < cost * SIMILAR]
