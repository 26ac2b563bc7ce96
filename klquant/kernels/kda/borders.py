"""Sequences of different lengths, one behind the other."""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from torch import Tensor


@dataclass(frozen=True)
class Borders:
    """Sequence n of N has positions host[n] … host[n + 1] − 1 of all; host [N + 1] int64 lies on the CPU, device is its
    copy beside what the sequences hold. None is empty.

    Without host one sequence is followed by padding, and only the device knows how long it is: what a CUDA graph wants.
    """

    host: Tensor | None
    device: Tensor

    @cached_property
    def spans(self) -> list[tuple[int, int]]:
        """First position and end of each."""
        return list(pairwise(self.host.tolist()))
