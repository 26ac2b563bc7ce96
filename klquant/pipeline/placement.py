"""Where a run keeps what it works on: chosen once, before work begins, from what memory is free and allowed.

Nothing here changes a result. Sizes in bytes; those of working memory are estimates.
"""

from dataclasses import dataclass

from klquant.calibrate.experts import BLOCK
from klquant.calibrate.footprint import Footprint, widest_layer
from klquant.calibrate.walk import WalkSettings
from klquant.checkpoint.config import KimiLinearConfig
from klquant.core.memory import CUDA_CONTEXT, free_memory, limit_memory, resident_memory
from klquant.core.units import decimal
from klquant.errors import UserError

# Share of the host memory left that the streams may take before they go to files. A CPU works in the rest.
MEMORY_SHARE = {"cpu": 0.3, "cuda": 0.9}
# Host memory of this process beside weights and activations: Python, torch, CUDA's own.
HOST_BASE = 3 << 30
# Share of a card's allowance that a run plans with. Torch keeps what it has freed, up to its limit; the rest is air.
CARD_SHARE = 0.91
STORED_ITEM = 2


@dataclass(frozen=True)
class Limits:
    """What a run may use, None for all there is."""

    gpu: int | None = None
    cpu: int | None = None


NO_LIMITS = Limits()


@dataclass(frozen=True)
class Placement:
    """`in_files`: the streams (`streams` bytes) live in files beside the output. With a GPU: `host`, what the run takes
    in host memory, and `device`, what it takes at least on each card."""

    streams: int
    in_files: bool
    host: int | None = None
    device: int | None = None

    def __str__(self) -> str:
        where = "in files beside the output, memory is short" if self.in_files else "in host memory"
        text = f"activations ({decimal(self.streams)}) are kept {where}"
        if self.host is None:
            return text
        return f"{text}; about {decimal(self.host)} of RAM in all, and {decimal(self.device)} or more on a card"


def limit_devices(settings: WalkSettings, limits: Limits) -> None:
    """Hold torch to `limits.gpu` on each card. Raises UserError when that leaves nothing to work with."""
    if limits.gpu is None or settings.device.type != "cuda":
        return
    for device in settings.devices:
        room = int(CARD_SHARE * limits.gpu) - CUDA_CONTEXT
        if room <= 0:
            raise UserError(f"--max-gpu-memory {decimal(limits.gpu)}: CUDA itself takes {decimal(CUDA_CONTEXT)}")
        limit_memory(device, room)


def place(
    config: KimiLinearConfig, settings: WalkSettings, windows: int, length: int, streams: int, limits: Limits
) -> Placement:
    """Where `streams` streams of `windows` windows live.

    Raises UserError, with the figure that would work, when a layer does not fit the host memory or a card.
    """
    cuda = settings.device.type == "cuda"
    size = streams * windows * length * config.hidden_size * settings.dtype.itemsize
    # One layer's weights read ahead; one layer's output waiting to be written and one in the making, at 8 bits or less.
    working = (STORED_ITEM + 2) * widest_layer(config) + HOST_BASE if cuda else 0
    allowed = free_memory()
    if limits.cpu is not None:
        # On a CPU `working` has nothing of the process itself.
        allowed = min(allowed, limits.cpu - (0 if cuda else resident_memory()))
    kind = settings.device.type
    need = Footprint.of(config, settings.batch * length, settings.dtype.itemsize, BLOCK[kind], streams > 1)
    least = working if cuda else need.least
    if allowed < least:
        raise UserError(
            f"host memory: a layer takes about {decimal(least)}, {decimal(max(0, allowed))} are free or allowed; "
            "free memory or raise --max-cpu-memory"
        )
    in_files = size > MEMORY_SHARE[kind] * (allowed - working)
    if not cuda:
        return Placement(size, in_files)
    for device in settings.devices:
        if (free := free_memory(device)) < need.least:
            raise UserError(
                f"{device}: a layer takes about {decimal(need.least)}, {decimal(free)} are free or allowed; "
                "free memory on the card, raise --max-gpu-memory or use --device cpu"
            )
    return Placement(size, in_files, working + (0 if in_files else size), need.least)
