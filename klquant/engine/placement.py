"""Which device holds what: one card, or layers in order over cards of unequal size; planned before anything is loaded.

Bytes are those of `klquant.recipe.memory`, the planner of `klquant plan`. A token passes the cards one after another:
what is balanced is the bytes that it makes each of them read, as far as they all have the room.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Required, TypedDict, Unpack

import torch

from klquant.checkpoint.config import KimiLinearConfig
from klquant.checkpoint.names import expected_tensors
from klquant.core.device import pick_device
from klquant.core.memory import CUDA_CONTEXT, free_memory, limit_memory
from klquant.errors import UserError
from klquant.recipe.memory import GIB, Memory, Split, WeightSizes, best_split, predict_memory
from klquant.recipe.plan import make_plan
from klquant.recipe.schema import known_recipes, load_recipe

# The oldest cards with BF16 products and asynchronous copies, which all kernels use.
LEAST_CAPABILITY = (8, 0)
CPU = torch.device("cpu")
# Contexts tried for an answer to "what would fit" are multiples of this.
CONTEXT_STEP = 1024
PARTS = ("weights", "latent_cache", "kda_state", "workspace", "runtime")


@dataclass(frozen=True)
class Share:
    """What one device is to hold: `layers` (0-based), and bytes by part. `room`: bytes it may use."""

    device: torch.device
    room: int
    layers: range
    weights: int
    latent_cache: int
    kda_state: int
    workspace: int
    runtime: int

    @property
    def total(self) -> int:
        return sum(getattr(self, part) for part in PARTS)


@dataclass(frozen=True)
class Placement:
    """A share for every device that is used, in order of layers. `packed`: whether weights keep their grids."""

    shares: tuple[Share, ...]
    memory: Memory
    embedding_bytes: int
    packed: bool

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


def find_devices(names: str, max_memory: Mapping[str, int] | None = None) -> dict[torch.device, int]:
    """ "cuda:0,cuda:1", "cuda" or "cpu" → bytes that each may use: what is free, at most what `max_memory` says.

    Torch is held to what `max_memory` says of a CUDA device.
    Raises UserError for a device that is not there, is named twice, or is too old.
    """
    limits = {_numbered(pick_device(name)): limit for name, limit in (max_memory or {}).items()}
    found: dict[torch.device, int] = {}
    for name in names.split(","):
        device = _numbered(pick_device(name.strip()))
        if device in found:
            raise UserError(f"device {name.strip()} is named twice in {names!r}")
        if device.type == "cuda" and (capability := torch.cuda.get_device_capability(device)) < LEAST_CAPABILITY:
            raise UserError(
                f"device {device}: {torch.cuda.get_device_name(device)} has compute capability "
                f"{'.'.join(map(str, capability))}; klquant's kernels need 8.0 (RTX 30 series, A100) or later"
            )
        found[device] = min(free_memory(device), limits.get(device, 1 << 62))
        if device.type == "cuda" and device in limits:
            limit_memory(device, max(0, limits[device] - CUDA_CONTEXT))
    if CPU in found and len(found) > 1:
        raise UserError(f"devices {names!r}: layers run on CUDA devices or on the CPU, not on both")
    if idle := limits.keys() - found.keys():
        raise UserError(f"memory is limited on {', '.join(map(str, idle))}, which is not among the devices {names!r}")
    return found


def _numbered(device: torch.device) -> torch.device:
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


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
    **needs: Unpack[Needs],
) -> Placement:  # fmt: skip
    """Place a model whose weights take `sizes` (`held_sizes`) on `devices`. The embedding goes to the CPU where that
    makes it fit.

    Raises UserError that says how much is missing, and what would fit.
    """
    memory, split = _best(config, sizes, devices, needs)
    if split.missing:
        raise UserError(_does_not_fit(config, sizes, devices, needs))
    shares, start = [], 0
    for (device, room), end in zip(devices.items(), split.ends, strict=True):
        if end > start:
            shares.append(_share(config, sizes, memory, device, room, range(start, end)))
        start = end
    return Placement(tuple(shares), memory, sizes.embedding, packed)


def longest_context(
    config: KimiLinearConfig, sizes: WeightSizes, devices: Mapping[torch.device, int], **needs: Unpack[Needs]
) -> int:
    """The most tokens, in steps of CONTEXT_STEP and up to `context`, that `devices` hold beside the weights; or 0."""
    low, high = 0, needs["context"] // CONTEXT_STEP
    while low < high:
        middle = (low + high + 1) // 2
        split = _best(config, sizes, devices, needs | {"context": middle * CONTEXT_STEP})[1]
        low, high = (low, middle - 1) if split.missing else (middle, high)
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
    config: KimiLinearConfig, sizes: WeightSizes, memory: Memory, device: torch.device, room: int, layers: range
) -> Share:
    mla = sum(config.is_mla(i) for i in layers)
    weights = sum(sizes.layers[i] for i in layers)
    if 0 in layers and not memory.embedding_on_cpu:
        weights += sizes.embedding
    if config.num_layers - 1 in layers:
        weights += sizes.final
    return Share(
        device, room, layers, weights,
        latent_cache=mla * memory.latent_cache // max(1, len(config.mla_layers)),
        kda_state=(len(layers) - mla) * memory.kda_state // max(1, config.num_layers - len(config.mla_layers)),
        workspace=memory.workspace, runtime=memory.runtime,
    )  # fmt: skip


def _does_not_fit(
    config: KimiLinearConfig, sizes: WeightSizes, devices: Mapping[torch.device, int], needs: Needs
) -> str:
    """One line: what is missing, and what would fit instead."""
    memory, split = _best(config, sizes, devices, needs)
    ways = _ways(config, sizes, devices, needs)
    if needs.get("prefixes"):
        none = needs | {"prefixes": 0}
        if not _best(config, sizes, devices, none)[1].missing:
            ways = ["prefixes 0", *ways]
        elif not ways:
            ways = [f"{way} and prefixes 0" for way in _ways(config, sizes, devices, none)]
    where = ", ".join(f"{device} ({room / GIB:.1f} GiB free)" for device, room in devices.items())
    parts = (
        f"weights {memory.weights / GIB:.1f}, latent cache {memory.latent_cache / GIB:.1f}, KDA state "
        f"{memory.kda_state / GIB:.1f}, workspace and runtime {(memory.workspace + memory.runtime) / GIB:.1f} a device"
    )
    return (
        f"the model with {memory.context:,} tokens of context does not fit {where}: {split.missing / GIB:.2f} GiB are "
        f"missing ({parts}, in GiB); what would fit: {'; '.join(ways) or 'nothing klquant makes, at any context'}"
    )


def _ways(config: KimiLinearConfig, sizes: WeightSizes, devices: Mapping[torch.device, int], needs: Needs) -> list[str]:
    """Of what is asked for, what could be changed so that it fits."""
    memory = _best(config, sizes, devices, needs)[0]
    ways, eight = [], needs | {"cache_bits": 8}
    if memory.cache_bits > 8 and not _best(config, sizes, devices, eight)[1].missing:
        ways.append("an 8-bit latent cache")
    if shorter := longest_context(config, sizes, devices, **needs):
        ways.append(f"a context of {shorter:,} tokens")
    elif memory.cache_bits > 8 and (shorter := longest_context(config, sizes, devices, **eight)):
        ways.append(f"a context of {shorter:,} tokens with an 8-bit latent cache")
    recipes = [
        name for name, stored in _recipe_sizes(config).items() if not _best(config, stored, devices, needs)[1].missing
    ]
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
