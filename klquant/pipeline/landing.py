"""Host memory where a unit's packed weights arrive from a GPU at full speed."""

from collections.abc import Iterable

import torch
from torch import Tensor

from klquant.core.memory import aligned, own_pages, pin, unpin


class Landing:
    """Two pinned buffers in turn, so that what arrived in one can be written while the next unit arrives in the other;
    use it in a `with` block that outlasts the writing.

    Without a GPU tensors stay where they are and there are no buffers.
    """

    def __init__(self, nbytes: int, devices: Iterable[torch.device]) -> None:
        """`nbytes`: the most that one unit brings (`room` of its tensors)."""
        self._cards = [device for device in devices if device.type == "cuda"]
        self._buffers = [own_pages(nbytes) for _ in range(2)] if self._cards and nbytes else []
        self._pinned = [pin(buffer) for buffer in self._buffers]
        self._taken = 0

    def __enter__(self) -> "Landing":
        return self

    def __exit__(self, *_) -> None:
        for buffer, pinned in zip(self._buffers, self._pinned, strict=True):
            if pinned:
                unpin(buffer)
        self._buffers = []

    def turn(self) -> None:
        """Begin a unit; what arrived with the last but one is overwritten."""
        self._buffers.reverse()
        self._pinned.reverse()
        self._taken = 0

    def bring(self, tensor: Tensor) -> Tensor:
        """The tensor on the CPU. Of a GPU's, the values are there after `settle`."""
        if not tensor.is_cuda:
            return tensor
        end = self._taken + tensor.nbytes
        out = self._buffers[0][self._taken : end].view(tensor.dtype).view(tensor.shape)
        self._taken += aligned(tensor.nbytes)
        return out.copy_(tensor, non_blocking=True)

    def settle(self) -> None:
        """Wait for what is on its way."""
        for card in self._cards:
            torch.cuda.synchronize(card)


def room(sizes: Iterable[int]) -> int:
    """Bytes that tensors of `sizes` bytes take."""
    return sum(map(aligned, sizes))
