"""Triton kernels for the inner loops of `klquant.quantize`, each the fast form of a plain function outside this folder.

Weights on a CUDA device take the kernels, weights on a CPU the plain functions, which stay the reference.
Importing this package imports neither Triton nor a kernel.
"""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from torch import Tensor

_forced_plain = False


def serve(x: Tensor) -> bool:
    """Whether the kernels work on `x`: it lies on a CUDA device, Triton is there, and nobody asked for plain code."""
    return x.is_cuda and not _forced_plain and _has_triton()


@contextmanager
def plain() -> Iterator[None]:
    """Within this context the plain functions run on every device, to compare with."""
    global _forced_plain
    before, _forced_plain = _forced_plain, True
    try:
        yield
    finally:
        _forced_plain = before


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
