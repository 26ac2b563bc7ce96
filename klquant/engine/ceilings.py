"""What limits a decode step on this machine, and what that says of another card."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

# Bytes a second that an RTX 4090's memory is sold with.
RTX_4090 = 1.008e12
COPIES = 8
EMPTY_LAUNCHES = 512


@dataclass(frozen=True)
class Ceilings:
    """Of the first device. copy_bytes_s: of a large copy, read plus written. launch_s: from one small kernel of a graph
    to the next; launches: kernels in a step of one sequence. Both are None on a CPU."""

    copy_bytes_s: float
    launch_s: float | None
    launches: int | None

    def predict(self, nbytes: int, seconds: float, bytes_s: float) -> float | None:
        """Seconds on a card that copies `bytes_s` of what moves `nbytes` and takes `seconds` here: the bytes at the
        share of the bandwidth that was reached here outside launches, and as long for launches as here."""
        if self.launches is None:
            return None
        waiting = min(self.launches * self.launch_s, seconds / 2)
        share = nbytes / (seconds - waiting) / self.copy_bytes_s
        return nbytes / bytes_s / min(share, 1.0) + waiting


def copy_rate(device: torch.device) -> float:
    """Bytes a second, read plus written, of a copy that no cache holds."""
    a = torch.ones((1 << 30) if device.type == "cuda" else (1 << 27), dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    return 2 * a.nbytes / min(_time(device, lambda: b.copy_(a)) for _ in range(COPIES))


def launch_seconds(device: torch.device) -> float:
    """From a small kernel to the next in a graph."""
    x = torch.zeros(32, device=device)
    with torch.cuda.device(device):
        x.add_(1)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(EMPTY_LAUNCHES):
                x.add_(1)
        return min(_time(device, graph.replay) for _ in range(COPIES)) / EMPTY_LAUNCHES


def _time(device: torch.device, run: Callable[[], object]) -> float:
    run()
    synchronize([device])
    started = time.perf_counter()
    run()
    synchronize([device])
    return time.perf_counter() - started


def synchronize(devices: Iterable[torch.device]) -> None:
    """Wait for what was launched."""
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
