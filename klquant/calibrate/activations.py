"""The residual stream of all calibration windows between two layers, in memory or in a file."""

import os
import time
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from threading import Condition

import torch
from torch import Tensor

from klquant.core.memory import own_pages, pin, unpin
from klquant.core.units import decimal
from klquant.errors import UserError


class Gate:
    """Keeps what changes windows behind what copies them, window by window. `waited`: seconds in which anybody did."""

    def __init__(self) -> None:
        self.waited = 0.0
        self._waiting, self._since = 0, 0.0
        self._moved = Condition()
        self._passed = float("inf")

    def close(self) -> None:
        """A copy is to be made: nothing may be changed yet."""
        self.passed(0)

    def passed(self, windows: float) -> None:
        """The first `windows` may be changed."""
        with self._moved:
            self._passed = windows
            self._moved.notify_all()

    def open(self) -> None:
        self.passed(float("inf"))

    def wait(self, windows: int) -> None:
        """Until the first `windows` may be changed."""
        with self._moved:
            if not self._waiting:
                self._since = time.perf_counter()
            self._waiting += 1
            self._moved.wait_for(lambda: self._passed >= windows)
            self._waiting -= 1
            if not self._waiting:
                self.waited += time.perf_counter() - self._since


class Activations:
    """Windows [W, S, C] of one dtype, read and written in slices of whole windows.

    With `path` the data lives in a plain file and only the slice in use is in memory; the page cache keeps what fits.
    Without, `pinned` locks the memory, if the system allows it, so that a GPU copies from and to it at full speed.
    """

    def __init__(
        self, windows: int, length: int, width: int, dtype: torch.dtype, path: Path | None = None, *,
        pinned: bool = False,
    ) -> None:  # fmt: skip
        self.shape = (windows, length, width)
        self.dtype = dtype
        self.path = path
        self.gate = Gate()
        self._row = length * width * dtype.itemsize
        self._data = None if path else own_pages(self.nbytes).view(dtype).view(self.shape)
        self._pinned = self._data is not None and pinned and pin(self._data)
        self._fd = -1
        if path:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                os.posix_fallocate(self._fd, 0, windows * self._row)
            except OSError as error:
                os.close(self._fd)
                path.unlink(missing_ok=True)
                raise UserError(
                    f"{path}: no room for {decimal(windows * self._row)} of activations ({error.strerror}); "
                    "free disk space, then --resume"
                ) from None

    @property
    def nbytes(self) -> int:
        return self.shape[0] * self._row

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, start: int, stop: int) -> Tensor:
        """Windows [start, stop) on the CPU; a view when held in memory: do not change it in place."""
        if self._data is not None:
            return self._data[start:stop]
        out = torch.empty((stop - start, *self.shape[1:]), dtype=self.dtype)
        buffer = memoryview(out.view(torch.uint8).numpy()).cast("B")
        done = 0
        while done < len(buffer):
            n = os.preadv(self._fd, [buffer[done:]], start * self._row + done)
            if n == 0:
                raise UserError(f"{self.path}: cut short while in use; go on with --resume")
            done += n
        return out

    def write(self, start: int, values: Tensor) -> None:
        """Store `values` [n, S, C] from window `start` on, as soon as the gate lets it."""
        self.gate.wait(start + values.shape[0])
        if self._data is not None:
            self._data[start : start + values.shape[0]].copy_(values)
            return
        flat = values.to("cpu", self.dtype).contiguous().view(torch.uint8).numpy()
        buffer = memoryview(flat).cast("B")
        done = 0
        try:
            while done < len(buffer):
                done += os.pwritev(self._fd, [buffer[done:]], start * self._row + done)
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written: {error.strerror}; free disk space, then --resume"
            ) from None

    def sync(self) -> None:
        if self._fd >= 0:
            os.fsync(self._fd)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        if self._pinned:
            unpin(self._data)
            self._pinned = False
        self._data = None


def feed(
    sources: list[Activations | None], starts: Sequence[int], size: int, device: torch.device
) -> Iterator[tuple[int, list[Tensor | None]]]:
    """First window and slices of up to `size` windows of each source, on the device.

    While one slice is worked on, the next is on its way to a GPU: write no window that was not handed out yet. At most
    three slices of a source take memory there, however far the host is ahead of the GPU.
    """
    total = len(next(source for source in sources if source is not None))

    def fetch(start: int) -> list[Tensor | None]:
        stop = min(start + size, total)
        return [None if s is None else s.read(start, stop).to(device, non_blocking=True) for s in sources]

    if device.type != "cuda":
        for start in starts:
            yield start, fetch(start)
        return
    side, here = _side_stream(device), torch.cuda.current_stream(device)
    coming = before = last = slices = None
    try:
        for start, following in zip(starts, [*starts[1:], None], strict=True):
            if coming is None:
                with torch.cuda.stream(side):
                    coming = fetch(start)
            here.wait_stream(side)
            if before is not None:
                before.synchronize()  # the slice before the last is done with, and may go back to the copies' stream
            # The last one may still be worked on, and whoever asked for it may have forgotten it: `last` keeps it.
            last, slices, coming = slices, coming, None
            before = here.record_event()
            if following is not None:
                with torch.cuda.stream(side):
                    coming = fetch(following)
            yield start, slices
    finally:
        # Work on the last slices may be under way: no later copy may take their place before its end.
        side.wait_stream(here)
        del last, slices


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of a card's copies. One for good: what is freed on a stream serves that stream alone."""
    return torch.cuda.Stream(device)
