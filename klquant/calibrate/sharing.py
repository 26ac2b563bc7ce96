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

# Kinds of device on which a group of batches is summed by itself and then added to the groups before it, in order: the
# same additions whoever did the group. A CPU, of which there is one, adds as it goes.
SPLIT = {"cuda"}
# Batches of a group: sums are a few hundred megabytes to bring to another card, and a few groups are enough to share.
GROUP = 4


def over_batches(
    walk: LayerWalk, phase: str, visit: Visit[Value], sums: Moments | None = None, *, reference: bool = True
) -> list[Value]:
    """`visit` every batch; what it returned, in order of batch, each on the device that took it.

    Devices take groups of batches in turn, the i-th of n always those whose number is i modulo n.
    """
    settings, quantized = walk.settings, walk.streams.quantized
    sources = [quantized, walk.streams.reference if reference else None]
    starts = range(0, len(quantized), settings.batch)
    groups = [starts[i : i + GROUP] for i in range(0, len(starts), GROUP)]
    split = settings.device.type in SPLIT
    devices = settings.devices[: len(groups)] if split else (settings.device,)
    walks = [walk, *(walk.on(device) for device in devices[1:])]
    feeds = [
        feed(sources, [start for group in groups[i :: len(devices)] for start in group], settings.batch, device)
        for i, device in enumerate(devices)
    ]

    @torch.no_grad()
    def work(i: int, group: range) -> tuple[list[Value], Moments | None]:
        values = []
        with current(devices[i]):
            own = sums.empty(devices[i]) if split and sums is not None else sums
            for start in group:
                if i == 0:
                    walk.progress(phase, start / len(quantized))
                _, (h, h_star) = next(feeds[i])
                values.append(visit(walks[i], start, h, h_star, own))
        return values, own

    values = []
    with ExitStack() as stack:
        pools = [stack.enter_context(ThreadPoolExecutor(1)) for _ in devices[1:]]
        for first in range(0, len(groups), len(devices)):
            here, *others = groups[first : first + len(devices)]
            jobs = [pool.submit(work, i, group) for i, (pool, group) in enumerate(zip(pools, others, strict=False), 1)]
            for found, own in (work(0, here), *(job.result() for job in jobs)):
                values += found
                if own is not sums:
                    sums.merge(own)
    return values


def current(device: torch.device) -> AbstractContextManager:
    """Makes a CUDA device the one that this thread launches on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
