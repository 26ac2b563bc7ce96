"""Triton kernels for the inner loops of `klquant.quantize`, each the fast form of a plain function outside this folder.

Weights on a CUDA device take the kernels, weights on a CPU the plain functions, which stay the reference.
Importing this package imports neither Triton nor a kernel.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from klquant.core.packages import is_installed

_forced_plain = False


def serve(x: Tensor) -> bool:
    """Whether the kernels work on `x`: it lies on a CUDA device, Triton is there, and nobody asked for plain code."""
    return x.is_cuda and not _forced_plain and is_installed("triton")


@contextmanager
def plain() -> Iterator[None]:
    """Within this context the plain functions run on every device, to compare with."""
    global _forced_plain
    before, _forced_plain = _forced_plain, True
    try:
        yield
    finally:
        _forced_plain = before
