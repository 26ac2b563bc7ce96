"""CUDA graphs of functions over static buffers."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

Outputs = tuple[Tensor, ...]
# Runs before a capture: kernels compile, libraries allocate what they keep.
WARM_UPS = 2


def on(device: torch.device) -> AbstractContextManager:
    """Launches inside go to `device`."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class Graph:
    """`run` captured on buffers that look like `inputs`, which must be harmless to run on: it happens several times.

    Outputs are overwritten by the next replay of any graph in the same memory pool.
    """

    def __init__(self, run: Callable[..., Outputs], inputs: tuple[Tensor, ...], pool: tuple[int, int]) -> None:
        self._inputs = tuple(x.clone() for x in inputs)
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UPS):
                run(*self._inputs)
        torch.cuda.current_stream().wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            self._outputs = run(*self._inputs)

    def __call__(self, *inputs: Tensor) -> Outputs:
        for buffer, x in zip(self._inputs, inputs, strict=True):
            buffer.copy_(x, non_blocking=True)
        self._graph.replay()
        return self._outputs
