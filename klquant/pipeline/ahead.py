"""The weights of the unit to come, read while the one before is worked on."""

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate
from math import prod

import torch
from torch import Tensor

from klquant.checkpoint.config import KimiLinearConfig
from klquant.checkpoint.dtypes import DTYPES
from klquant.checkpoint.reader import CheckpointReader
from klquant.core.memory import aligned, own_pages, pin, unpin

# Reads under way at once: a fast disk wants several, and finding NaN in 4 GB takes a core a second or two.
THREADS = 4


class Ahead:
    """A source of weights (`config`, `weight`) for units that are taken in turn; use it in a `with` block.

    `units` name the tensors of each unit. Those of the next one are read, as stored, and checked by threads; for a GPU
    into one pinned buffer, which is why what `weight` hands out must be copied before `advance`. What a thread raises
    (UserError: see CheckpointReader.weight) is raised where the tensor is asked for. Other tensors are read at once.
    `nbytes` were read so far; `waited` seconds were spent waiting for them.
    """

    def __init__(self, reader: CheckpointReader, units: Sequence[Sequence[str]], device: torch.device) -> None:
        self.reader = reader
        self.nbytes, self.waited = 0, 0.0
        self._left = list(units)
        self._coming: dict[str, Future[Tensor]] = {}
        self._pool = ThreadPoolExecutor(THREADS, "ahead")
        self._buffer: Tensor | None = None
        if device.type == "cuda":
            largest = max((sum(self._room(name) for name in names) for names in units), default=0)
            self._buffer = own_pages(largest)
            self._pinned = largest > 0 and pin(self._buffer)
        self.advance()

    def __enter__(self) -> "Ahead":
        return self

    def __exit__(self, *_) -> None:
        self._pool.shutdown(cancel_futures=True)
        if self._buffer is not None and self._pinned:
            unpin(self._buffer)
        self._buffer = None

    @property
    def config(self) -> KimiLinearConfig:
        return self.reader.config

    def weight(self, name: str, dtype: torch.dtype) -> Tensor:
        """The tensor on the CPU, converted to `dtype`. Raises UserError when it is damaged."""
        began = time.perf_counter()
        job = self._coming.pop(name, None)
        tensor = self._read(name, None) if job is None else job.result()
        self.waited += time.perf_counter() - began
        self.nbytes += tensor.nbytes
        return tensor.to(dtype)

    def advance(self) -> None:
        """Begin to read the next unit; of the last one nothing may be left to ask for or to copy."""
        assert not self._coming, "tensors of the last unit were not taken"
        names = self._left.pop(0) if self._left else ()
        starts = [0, *accumulate(self._room(name) for name in names)]
        for name, start in zip(names, starts, strict=False):
            self._coming[name] = self._pool.submit(self._read, name, start)

    def _room(self, name: str) -> int:
        return aligned(self.reader.info(name).nbytes)

    def _read(self, name: str, start: int | None) -> Tensor:
        """The tensor as stored, in the buffer from byte `start` on where there is one."""
        info, out = self.reader.info(name), None
        if self._buffer is not None and start is not None:
            dtype = DTYPES[info.dtype]
            out = self._buffer[start : start + prod(info.shape) * dtype.itemsize].view(dtype).view(info.shape)
        tensor = self.reader.read(name, out=out)
        self.reader.require_finite(name, tensor)
        return tensor
