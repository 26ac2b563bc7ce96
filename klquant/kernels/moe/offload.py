"""Experts that do not all fit on a card: those that were chosen last lie there, the others in the host's memory.

A card reads the host's memory over the bus, at a thirtieth of the speed of its own. But one token's experts are mostly
those of the tokens before it. So a step first lets experts that it needs change places with those that were not needed
for the longest, all on the card and in the step's CUDA graph: the host does not know where an expert lies. What is not
brought in because a step needs too many is read where it is.

A prompt needs all experts of every layer. Where there is room for it (`Staging`) those of the host are copied while the
layer before is at work.
"""

import weakref
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from klquant.kernels.linear.layout import Packed


@dataclass(frozen=True)
class Offload:
    """Where the E experts of a layer lie.

    far: gate·up and down of E − `near` experts, in locked memory of the host. place_E [E] int32: below `near` an
    expert's row among those on the card, from there on `near` more than its row in far. used_E [E] int64: the step that
    last chose it. totals [3] int64: steps so far, experts that they chose, those of them that were not on the card.
    """

    near: int
    far: tuple[Packed, Packed]
    place_E: Tensor
    used_E: Tensor
    totals: Tensor
    staging: "Staging | None" = None

    @classmethod
    def of(
        cls, near: int, far: tuple[Packed, Packed], device: torch.device | str, staging: "Staging | None" = None
    ) -> "Offload":
        """The first `near` experts lie on `device`, the others in `far`."""
        experts = near + far[0].experts
        place_E = torch.arange(experts, dtype=torch.int32, device=device)
        zeros = torch.zeros(experts + 3, dtype=torch.int64, device=device)
        return cls(near, far, place_E, zeros[:experts], zeros[experts:], staging)

    @property
    def experts(self) -> int:
        return len(self.place_E)

    def staged(self) -> "Offload":
        """The same with a copy of `far` on the card, good until the next layer's is asked for; or as it is."""
        return replace(self, far=self.staging.take(self)) if self.staging and self.staging.rooms else self


@dataclass
class Staging:
    """Room on a card for the host's experts of two layers: the one at work, and the one behind it.

    rooms: two of as many bytes as the largest layer has there, or none.
    """

    rooms: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        # Weak, for they know of this: no layer's memory should wait for the garbage collector.
        self._layers: list[weakref.ref[Offload]] = []
        self._coming: tuple[int, tuple[Packed, Packed], torch.cuda.Event] | None = None
        self._stream: torch.cuda.Stream | None = None

    def open(self, layers: list[Offload], nbytes: int) -> None:
        """Make two rooms of `nbytes`; `layers`: those that share them, in the order in which they are run."""
        device = layers[0].place_E.device
        self.rooms = [torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(2)]
        self._layers = [weakref.ref(layer) for layer in layers]

    def take(self, layer: Offload) -> tuple[Packed, Packed]:
        """The host's experts of a layer, on the card for what is launched next on the current stream. Those of the
        layer behind it begin to come."""
        at = next(i for i, other in enumerate(self._layers) if other() is layer)
        if self._coming is None or self._coming[0] != at:
            self._fetch(at)
        _, far, there = self._coming
        self._coming = None
        torch.cuda.current_stream(layer.place_E.device).wait_event(there)
        if at + 1 < len(self._layers):
            self._fetch(at + 1)
        return far

    def _fetch(self, at: int) -> None:
        layer, room = self._layers[at](), self.rooms[at % 2]
        self._stream = self._stream or torch.cuda.Stream(room.device)
        # Whoever reads what is there was launched before.
        self._stream.wait_stream(torch.cuda.current_stream(room.device))
        with torch.cuda.stream(self._stream):
            far = _copied(layer.far, room)
            self._coming = at, far, self._stream.record_event()


def _copied(far: tuple[Packed, Packed], room: Tensor) -> tuple[Packed, Packed]:
    """A copy in `room` [bytes], one tensor behind the other."""
    start = 0

    def copied(t: Tensor) -> Tensor:
        nonlocal start
        here = room[start : start + t.nbytes].view(t.dtype).view(t.shape)
        start += t.nbytes
        return here.copy_(t, non_blocking=True)

    return tuple(w.map(copied) for w in far)
