"""The residual stream of all calibration windows between two layers, in memory or in a file."""

import os
from pathlib import Path

import torch
from torch import Tensor

from klquant.errors import UserError


class Activations:
    """Windows [W, S, C] of one dtype, read and written in slices of whole windows.

    With `path` the data lives in a plain file and only the slice in use is in memory; the page cache keeps what fits.
    """

    def __init__(self, windows: int, length: int, width: int, dtype: torch.dtype, path: Path | None = None) -> None:
        self.shape = (windows, length, width)
        self.dtype = dtype
        self.path = path
        self._row = length * width * dtype.itemsize
        self._data = None if path else torch.empty(self.shape, dtype=dtype)
        self._fd = -1
        if path:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                os.posix_fallocate(self._fd, 0, windows * self._row)
            except OSError as error:
                os.close(self._fd)
                path.unlink(missing_ok=True)
                raise UserError(
                    f"{path}: no room for {windows * self._row / 1e9:.1f} GB of activations ({error.strerror}); "
                    "free disk space or calibrate on fewer tokens"
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
                raise UserError(f"{self.path}: truncated activations; start again without --resume")
            done += n
        return out

    def write(self, start: int, values: Tensor) -> None:
        """Store `values` [n, S, C] from window `start` on."""
        if self._data is not None:
            self._data[start : start + values.shape[0]] = values.to(self.dtype).cpu()
            return
        flat = values.to("cpu", self.dtype).contiguous().view(torch.uint8).numpy()
        buffer = memoryview(flat).cast("B")
        done = 0
        try:
            while done < len(buffer):
                done += os.pwritev(self._fd, [buffer[done:]], start * self._row + done)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written: {error.strerror}; free disk space, then resume") from None

    def sync(self) -> None:
        if self._fd >= 0:
            os.fsync(self._fd)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._data = None
