"""CUDA graphs of functions over static buffers."""

from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

Outputs = tuple[Tensor, ...]
# Runs before a capture: kernels compile, libraries allocate what they keep.
WARM_UPS = 2


def on(device: torch.device) -> AbstractContextManager:
    """Launches inside go to `device`."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class Graphs:
    """The captured functions of one device, and what runs `beside` them. They share memory: none may run while another
    does. So they are captured on one stream of that device."""

    def __init__(self, device: torch.device) -> None:
        with on(device):
            self._stream, self._pool = torch.cuda.Stream(), torch.cuda.MemPool()
        self._captured: dict[Hashable, tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], Outputs]] = {}

    @contextmanager
    def beside(self) -> Iterator[None]:
        """What is launched inside takes the memory of the captured functions, which the next of them overwrites: behind
        all that was launched before, and before all that comes. Enter it with the device current (`on`)."""
        here = torch.cuda.current_stream()
        self._stream.wait_stream(here)
        try:
            with torch.cuda.stream(self._stream), torch.cuda.use_mem_pool(self._pool):
                yield
        finally:
            # An interrupt included: a graph that is replayed next must not meet what still runs.
            here.wait_stream(self._stream)

    def run(
        self, key: Hashable, function: Callable[..., Outputs], inputs: tuple[Tensor, ...],
        harmless: Callable[[], tuple[Tensor, ...]],
    ) -> Outputs:  # fmt: skip
        """function(*inputs), captured when `key` is new: then it runs several times on inputs of the same shapes that
        change nothing, `harmless()`. Outputs are overwritten by the next run. Call it with the device current (`on`).
        """
        if key not in self._captured:
            self._captured[key] = self._capture(function, harmless())
        graph, buffers, outputs = self._captured[key]
        for buffer, x in zip(buffers, inputs, strict=True):
            buffer.copy_(x, non_blocking=True)
        graph.replay()
        return outputs

    def _capture(self, function: Callable[..., Outputs], buffers: tuple[Tensor, ...]):
        with self.beside():
            for _ in range(WARM_UPS):
                function(*buffers)
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as one that imports, may ask CUDA for things meanwhile.
        with torch.cuda.graph(graph, pool=self._pool.id, stream=self._stream, capture_error_mode="thread_local"):
            outputs = function(*buffers)
        return graph, buffers, outputs
