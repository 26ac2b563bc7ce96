"""Time on a GPU: medians of CUDA graph replays, and the two ceilings to compare with."""

from collections.abc import Callable
from functools import cache
from statistics import median

import torch

# Several times what any card's L2 holds.
L2_BYTES = 256 << 20


def time_us(calls: list[Callable[[], object]], seconds: float = 0.05) -> float:
    """Median over graph replays of the time of one call; the graph holds all `calls`."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in "se")

    def once() -> float:
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3

    shortest = min(once() for _ in range(3))
    times = [once() for _ in range(max(5, min(200, int(seconds * 1e6 / shortest))))]
    return median(times) / len(calls)


def copies_for(nbytes: int) -> int:
    """How many weights of `nbytes` to walk over so that none is found in the cache."""
    return max(2, min(64, -(-L2_BYTES // nbytes)))


@cache
def copy_rate() -> float:
    """Bytes a second that a kernel copies, read plus written. (In a graph `copy_` is the copy engine's, and slower.)"""
    a = torch.empty(1 << 30, dtype=torch.int32, device="cuda").random_()
    b = torch.empty_like(a)
    return 2 * a.nbytes / time_us([lambda: torch.bitwise_not(a, out=b)]) * 1e6


@cache
def matmul_rate() -> float:
    """FLOP a second of a large BF16 product of random matrices."""
    x, y = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in "xy")
    return 2 * 8192**3 / time_us([lambda: x @ y] * 4) * 1e6
