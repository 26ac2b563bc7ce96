"""The batches of a layer's tokens, shared out between devices; bytes do not depend on how many there are."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from klquant.calibrate.activations import feed
from klquant.quantize.hessian import Moments

if TYPE_CHECKING:
    from klquant.calibrate.walk import LayerWalk

Value = TypeVar("Value")
# (walk on a device, first window, quantized stream, reference stream, sums to add to) → whatever the caller collects.
Visit = Callable[["LayerWalk", int, Tensor, Tensor | None, Moments | None], Value]

# Kinds of device on which a batch is summed by itself and then added to the sums before it, in order of batch: the same
# additions whoever did the batch. A CPU, of which there is one, adds as it goes.
SPLIT = {"cuda"}


def over_batches(
    walk: LayerWalk, phase: str, visit: Visit[Value], sums: Moments | None = None, *, reference: bool = True
) -> list[Value]:
    """`visit` every batch; what it returned, in order of batch, each on the device that took it.

    Devices take batches in turn, the i-th of n always those whose number is i modulo n.
    """
    settings, quantized = walk.settings, walk.streams.quantized
    sources = [quantized, walk.streams.reference if reference else None]
    starts = range(0, len(quantized), settings.batch)
    split = settings.device.type in SPLIT
    devices = settings.devices[: len(starts)] if split else (settings.device,)
    walks = [walk, *(walk.on(device) for device in devices[1:])]
    feeds = [feed(sources, starts[i :: len(devices)], settings.batch, d) for i, d in enumerate(devices)]

    @torch.no_grad()
    def step(i: int) -> tuple[Value, Moments | None]:
        with current(devices[i]):
            start, (h, h_star) = next(feeds[i])
            own = sums.empty(devices[i]) if split and sums is not None else sums
            return visit(walks[i], start, h, h_star, own), own

    values = []
    with ExitStack() as stack:
        pools = [stack.enter_context(ThreadPoolExecutor(1)) for _ in devices[1:]]
        for first in range(0, len(starts), len(devices)):
            walk.progress(phase, first / len(starts))
            jobs = [pool.submit(step, i) for i, pool in enumerate(pools, 1) if first + i < len(starts)]
            for value, own in (step(0), *(job.result() for job in jobs)):
                values.append(value)
                if own is not sums:
                    sums.merge(own)
    return values


def current(device: torch.device) -> AbstractContextManager:
    """Makes a CUDA device the one that this thread launches on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
