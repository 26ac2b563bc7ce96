"""CUDA graphs of functions over static buffers."""

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from klquant.recipe.memory import GRAPHED_PROMPT

Outputs = tuple[Tensor, ...]
# Runs before a capture: kernels compile, libraries allocate what they keep.
WARM_UPS = 2
# Longest prompt that is a graph on Hopper. Its memory, the planner's largest estimate of a graph, is 0.15 GiB more than
# that of GRAPHED_PROMPT: on cards with less of it and fewer multiprocessors the host keeps up with such prompts.
LARGE_PROMPT = 2_048


def on(device: torch.device) -> AbstractContextManager:
    """Launches inside go to `device`."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def longest_graphed(device: torch.device) -> int:
    """Tokens of the longest prompt that is a graph: with longer ones a device has more to do than the host."""
    hopper = device.type == "cuda" and torch.cuda.get_device_properties(device).major == 9
    return LARGE_PROMPT if hopper else GRAPHED_PROMPT


class Graphs:
    """The captured functions of one device. They share memory, so they are captured on one stream of that device."""

    def __init__(self, device: torch.device) -> None:
        with on(device):
            self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        self._captured: dict[Hashable, tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], Outputs]] = {}

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
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UPS):
                function(*buffers)
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as one that imports, may ask CUDA for things meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            outputs = function(*buffers)
        return graph, buffers, outputs
