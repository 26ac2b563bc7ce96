"""Which device holds what: one card, or layers in order over cards of unequal size; planned before anything is loaded.

Bytes are those of `klquant.recipe.memory`, the planner of `klquant plan`. A token passes the cards one after another:
what is balanced is the bytes that it makes each of them read, as far as they all have the room. What has to give way
first is the embedding, of which a token reads a row, and then some experts of every layer: both may lie in the host's
memory (`klquant.kernels.moe.offload`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import inf
from typing import Required, TypedDict, Unpack

import torch

from klquant.checkpoint.config import KimiLinearConfig
from klquant.checkpoint.names import expected_tensors
from klquant.core.device import numbered, pick_device, pick_devices
from klquant.core.memory import CUDA_CONTEXT, free_memory, limit_memory
from klquant.errors import UserError
from klquant.recipe.memory import (
    GIB,
    Memory,
    Split,
    WeightSizes,
    best_split,
    expert_table_bytes,
    experts_leaving,
    predict_memory,
    staging_bytes,
)
from klquant.recipe.plan import make_plan
from klquant.recipe.schema import known_recipes, load_recipe

# The oldest cards with BF16 products and asynchronous copies, which all kernels use.
LEAST_CAPABILITY = (8, 0)
CPU = torch.device("cpu")
# Contexts tried for an answer to "what would fit" are multiples of this.
CONTEXT_STEP = 1024
# Of the host's free memory, what experts may take: locked pages cannot be swapped out, and others need some too.
HOST_SHARE = 0.8
PARTS = ("weights", "latent_cache", "kda_state", "workspace", "runtime")


@dataclass(frozen=True)
class Share:
    """What one device is to hold: `layers` (0-based), and bytes by part. `room`: bytes it may use; `offloaded`: bytes
    of its layers' experts that the host holds instead."""

    device: torch.device
    room: int
    layers: range
    weights: int
    latent_cache: int
    kda_state: int
    workspace: int
    runtime: int
    offloaded: int = 0

    @property
    def total(self) -> int:
        return sum(getattr(self, part) for part in PARTS)


@dataclass(frozen=True)
class Placement:
    """A share for every device that is used, in order of layers. `packed`: whether weights keep their grids.

    experts: of a layer; far: those of each layer that lie in the host's memory. instead: what could be asked for so
    that none has to.
    """

    shares: tuple[Share, ...]
    memory: Memory
    embedding_bytes: int
    packed: bool
    experts: int
    far: tuple[int, ...]
    instead: tuple[str, ...] = ()

    @property
    def layers(self) -> tuple[torch.device, ...]:
        """The device of each layer."""
        return tuple(share.device for share in self.shares for _ in share.layers)

    @property
    def embedding(self) -> torch.device:
        return CPU if self.memory.embedding_on_cpu else self.shares[0].device

    @property
    def head(self) -> torch.device:
        """With the last layer."""
        return self.shares[-1].device

    @property
    def offloaded(self) -> int:
        """Bytes of experts in the host's memory."""
        return sum(share.offloaded for share in self.shares)

    @property
    def note(self) -> str | None:
        """What to tell people, if experts lie in the host's memory."""
        if not self.offloaded:
            return None
        most = max(self.far)
        others = f"; all have room with {', or with '.join(self.instead)}" if self.instead else ""
        return (
            f"{self.offloaded / GIB:.1f} GiB of experts, up to {most} of a layer's {self.experts}, have no room on the "
            "GPU: they lie in the host's memory, change places with those on the GPU as tokens need them, and cost "
            f"speed{others}"
        )

    @property
    def on_host(self) -> int:
        """Bytes that lie in the host's memory though layers are on cards."""
        return self.offloaded + (self.embedding_bytes if self.memory.embedding_on_cpu else 0)


class Allowed(int):
    """Bytes of a device that `max_memory` allows, where more are free."""


def find_devices(names: str, max_memory: Mapping[str, int] | None = None) -> dict[torch.device, int]:
    """ "cuda:0,cuda:1", "cuda" or "cpu" → bytes that each may use: what is free, at most what `max_memory` says
    (`Allowed`, then).

    Torch is held to what `max_memory` says of a CUDA device.
    Raises UserError as `pick_devices` does, and for a card that is too old.
    """
    limits = {numbered(pick_device(name)): Allowed(limit) for name, limit in (max_memory or {}).items()}
    found: dict[torch.device, int] = {}
    for device in map(numbered, pick_devices(names)):
        if device.type == "cuda" and (capability := torch.cuda.get_device_capability(device)) < LEAST_CAPABILITY:
            raise UserError(
                f"device {device}: {torch.cuda.get_device_name(device)} has compute capability "
                f"{'.'.join(map(str, capability))}; klquant's kernels need 8.0 (RTX 30 series, A100) or later"
            )
        found[device] = min(free_memory(device), limits.get(device, 1 << 62))
        if device.type == "cuda" and device in limits:
            limit_memory(device, max(0, limits[device] - CUDA_CONTEXT))
    if idle := limits.keys() - found.keys() - {CPU}:
        raise UserError(f"memory is limited on {', '.join(map(str, idle))}, which is not among the devices {names!r}")
    return found


def host_room(max_memory: Mapping[str, int] | None = None) -> int:
    """Bytes of experts that may lie in the host's memory: a share of what is free, or what `max_memory` says of cpu."""
    asked = (max_memory or {}).get("cpu")
    return int(free_memory() * HOST_SHARE) if asked is None else min(asked, free_memory())


class Needs(TypedDict, total=False):
    """What is to fit beside the weights, as `predict_memory` takes it: `context` cached tokens over all `sequences`
    and `prefixes`."""

    context: Required[int]
    sequences: int
    prefixes: int
    cache_bits: int
    activation_bytes: int


def plan_placement(
    config: KimiLinearConfig, sizes: WeightSizes, devices: Mapping[torch.device, int], *, packed: bool = True,
    host: int = 0, **needs: Unpack[Needs],
) -> Placement:  # fmt: skip
    """Place a model whose weights take `sizes` (`held_sizes`) on `devices`. The embedding goes to the CPU where that
    makes it fit, and where it does not, some experts of each layer do, up to `host` bytes.

    Raises UserError that says how much is missing, and what would fit.
    """
    found = _fit(config, sizes, devices, needs, host)
    if found is None:
        raise UserError(_does_not_fit(config, sizes, devices, needs, host))
    memory, ends, far = found
    shares, start = [], 0
    for (device, room), end in zip(devices.items(), ends, strict=True):
        if end > start:
            shares.append(_share(config, sizes, memory, device, room, range(start, end), far))
        start = end
    instead = _ways(config, sizes, devices, needs) if any(far) else ()
    return Placement(tuple(shares), memory, sizes.embedding, packed, config.num_experts, far, tuple(instead))


# What is needed, the layer after each device's last, and experts of each layer that lie in the host's memory.
Fit = tuple[Memory, tuple[int, ...], tuple[int, ...]]


def _fit(
    config: KimiLinearConfig, sizes: WeightSizes, devices: Mapping[torch.device, int], needs: Needs, host: float
) -> Fit | None:
    """How it fits best, without experts in the host's memory if that can be; None: not with `host` bytes of them."""
    memory, split = _best(config, sizes, devices, needs)
    if not split.missing:
        return memory, split.ends, (0,) * config.num_layers
    if not host or (found := _offloaded(config, sizes, memory, devices)) is None:
        return None
    return (memory, *found) if _expert_bytes(config, sizes, found[1]) <= host else None


def _offloaded(
    config: KimiLinearConfig, sizes: WeightSizes, memory: Memory, devices: Mapping[torch.device, int]
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """(layer after each device's last, experts of each layer that leave its card), or None: some layer cannot keep as
    many as a token needs.

    As many leave all layers of a card. Misses grow faster than what leaves: the split is the one whose squares of
    that, over all layers, add up to the least.
    """
    count = config.num_layers
    best: dict[int, tuple[int, tuple[int, ...], tuple[int, ...]]] = {0: (0, (), ())}
    for room in devices.values():
        room -= memory.workspace + memory.runtime
        splits = {}
        for start, (cost, ends, far) in best.items():
            for end in range(start, count + 1):
                routed = sizes.routed[start:end]
                leave = experts_leaving(config, routed, sum(memory.stages[start:end]) - room) if end > start else 0
                if leave is not None:
                    leaves = tuple(leave if size else 0 for size in routed)
                    option = cost + sum(n * n for n in leaves), (*ends, end), far + leaves
                    splits[end] = min(option, splits.get(end, option))
        best = splits
    return best[count][1:] if count in best else None


def _expert_bytes(config: KimiLinearConfig, sizes: WeightSizes, far: Sequence[int]) -> int:
    """Of so many experts of each layer."""
    return sum(n * (routed // config.num_experts) for n, routed in zip(far, sizes.routed, strict=True) if n)


def longest_context(
    config: KimiLinearConfig, sizes: WeightSizes, devices: Mapping[torch.device, int], *, host: int = 0,
    **needs: Unpack[Needs],
) -> int:  # fmt: skip
    """The most tokens, in steps of CONTEXT_STEP and up to `context`, that `devices` hold beside the weights, of which
    `host` bytes of experts may lie in the host's memory; or 0."""
    low, high = 0, needs["context"] // CONTEXT_STEP
    while low < high:
        middle = (low + high + 1) // 2
        fits = _fit(config, sizes, devices, needs | {"context": middle * CONTEXT_STEP}, host)
        low, high = (middle, high) if fits else (low, middle - 1)
    return low * CONTEXT_STEP


def _best(
    config: KimiLinearConfig, sizes: WeightSizes, devices: Mapping[torch.device, int], needs: Needs
) -> tuple[Memory, Split]:
    """What is needed and how it is split best, with the embedding on the CPU only if it must be."""
    for on_cpu in (False, True):
        memory = predict_memory(config, sizes, **needs, embedding_on_cpu=on_cpu)
        rooms = [room - memory.workspace - memory.runtime for room in devices.values()]
        split = best_split(memory.stages, memory.reads, rooms)
        if not split.missing or CPU in devices:
            break
    return memory, split


def _share(
    config: KimiLinearConfig, sizes: WeightSizes, memory: Memory, device: torch.device, room: int, layers: range,
    far: Sequence[int],
) -> Share:  # fmt: skip
    mla = sum(config.is_mla(i) for i in layers)
    offloaded = _expert_bytes(config, sizes, [n if i in layers else 0 for i, n in enumerate(far)])
    weights = sum(sizes.layers[i] for i in layers) - offloaded
    left = [far[i] * (sizes.routed[i] // config.num_experts) for i in layers if far[i]]
    weights += len(left) * expert_table_bytes(config) + staging_bytes(max(left, default=0), len(left))
    if 0 in layers and not memory.embedding_on_cpu:
        weights += sizes.embedding
    if config.num_layers - 1 in layers:
        weights += sizes.final
    return Share(
        device, room, layers, weights,
        latent_cache=mla * memory.latent_cache // max(1, len(config.mla_layers)),
        kda_state=(len(layers) - mla) * memory.kda_state // max(1, config.num_layers - len(config.mla_layers)),
        workspace=memory.workspace, runtime=memory.runtime, offloaded=offloaded,
    )  # fmt: skip


def _does_not_fit(
    config: KimiLinearConfig, sizes: WeightSizes, devices: Mapping[torch.device, int], needs: Needs, host: int
) -> str:
    """One line: what is missing, and what would fit instead."""
    memory, split = _best(config, sizes, devices, needs)
    ways = _ways(config, sizes, devices, needs, host)
    if needs.get("prefixes"):
        none = needs | {"prefixes": 0}
        if _fit(config, sizes, devices, none, host):
            ways = ["prefixes 0", *ways]
        elif not ways:
            ways = [f"{way} and prefixes 0" for way in _ways(config, sizes, devices, none, host)]
    if host and (found := _fit(config, sizes, devices, needs, inf)):
        least = _expert_bytes(config, sizes, found[2])
        ways.append(f"{least / GIB:.1f} GiB of experts in the host's memory, of which they may take {host / GIB:.1f}")
    where = ", ".join(
        f"{device} ({room / GIB:.1f} GiB {'allowed by max_memory' if isinstance(room, Allowed) else 'free'})"
        for device, room in devices.items()
    )
    parts = (
        f"weights {memory.weights / GIB:.1f}, latent cache {memory.latent_cache / GIB:.1f}, KDA state "
        f"{memory.kda_state / GIB:.1f}, workspace and runtime {(memory.workspace + memory.runtime) / GIB:.1f} a device"
    )
    return (
        f"the model with {memory.context:,} tokens of context does not fit {where}: {split.missing / GIB:.2f} GiB are "
        f"missing ({parts}, in GiB); what would fit: {'; '.join(ways) or 'nothing klquant makes, at any context'}"
    )


def _ways(
    config: KimiLinearConfig, sizes: WeightSizes, devices: Mapping[torch.device, int], needs: Needs, host: int = 0
) -> list[str]:
    """Of what is asked for, what could be changed so that it fits."""
    memory = _best(config, sizes, devices, needs)[0]
    ways, eight = [], needs | {"cache_bits": 8}
    if memory.cache_bits > 8 and _fit(config, sizes, devices, eight, host):
        ways.append("an 8-bit latent cache")
    if shorter := longest_context(config, sizes, devices, host=host, **needs):
        ways.append(f"a context of {shorter:,} tokens")
    elif memory.cache_bits > 8 and (shorter := longest_context(config, sizes, devices, host=host, **eight)):
        ways.append(f"a context of {shorter:,} tokens with an 8-bit latent cache")
    recipes = [name for name, stored in _recipe_sizes(config).items() if _fit(config, stored, devices, needs, host)]
    if recipes:
        ways.append(f"the recipe {' or '.join(recipes)}")
    return ways


@cache
def _recipe_sizes(config: KimiLinearConfig) -> dict[str, WeightSizes]:
    """What `klquant plan` says of this model under each built-in recipe that applies to it, largest first."""
    tensors = {name: ("BF16", shape) for name, shape in expected_tensors(config).items()}
    found: dict[str, WeightSizes] = {}
    for name in known_recipes():
        try:
            sizes = make_plan(load_recipe(name), config, tensors).weight_sizes
        except UserError:  # its groups do not divide this model's matrices
            continue
        if sizes not in found.values():
            found[name] = sizes
    return dict(sorted(found.items(), key=lambda item: -item[1].total))
