"""Layers that are read while the one before them is at work."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from klquant.model.weights import LayerWeights


def one_ahead(load: Callable[[int], LayerWeights], layers: int, device: torch.device) -> Iterator[LayerWeights]:
    """`load` layer after layer, each while the caller works on the one before: two are on the device at a time.

    Keep no layer when asking for the next. A thread loads, on a stream of its own, so that its copies wait for no
    kernel of the caller's. What it raises is raised when the layer is asked for.
    """
    cuda = device.type == "cuda"
    side = torch.cuda.Stream(device) if cuda else None

    @torch.no_grad()
    def work(layer: int) -> LayerWeights:
        if not cuda:
            return load(layer)
        with torch.cuda.device(device), torch.cuda.stream(side):
            return load(layer)

    with ThreadPoolExecutor(1, "one-ahead") as pool:
        coming = pool.submit(work, 0)
        for layer in range(layers):
            # The layer before is let go of here and not earlier: kernels may still be reading it, and until this one is
            # whole the thread would take the memory. What comes next takes it behind those kernels.
            weights = coming.result()
            if cuda:
                here = torch.cuda.current_stream(device)
                here.wait_stream(side)
                side.wait_stream(here)
            if layer + 1 < layers:
                coming = pool.submit(work, layer + 1)
            yield weights
