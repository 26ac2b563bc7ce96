"""Memory by device and part, predicted and actual; and the bytes that a decode step moves. All figures in bytes."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from klquant.checkpoint.config import KimiLinearConfig
from klquant.engine.placement import CPU, PARTS, Placement
from klquant.engine.state import DeviceState
from klquant.engine.weights import EngineWeights, storage_bytes
from klquant.kernels.moe.dispatch import QuantExperts
from klquant.model.weights import PackedMoE
from klquant.recipe.memory import WeightSizes, kda_state_bytes, latent_bytes


@dataclass(frozen=True)
class Usage:
    """`actual` is None before it is known, and for what cannot be measured on a CPU."""

    device: torch.device
    part: str
    predicted: int
    actual: int | None


def predicted_usage(placement: Placement) -> list[Usage]:
    """A row a part and device, and one for what lies on the CPU beside GPUs; nothing is measured yet."""
    rows = [Usage(share.device, part, getattr(share, part), None) for share in placement.shares for part in PARTS]
    return rows + ([Usage(CPU, "weights", placement.on_host, None)] if placement.on_host else [])


def measured_usage(placement: Placement, weights: EngineWeights, states: Sequence[DeviceState]) -> list[Usage]:
    """The same rows with what is held now; `states`: of all devices.

    Workspace is the most that PyTorch had allocated beside the rest since `torch.cuda.reset_peak_memory_stats`; runtime
    is what the device has in use beyond that, other processes included.
    """
    held = {
        "weights": storage_bytes(weights),
        "latent_cache": storage_bytes(*(state.latent for state in states)),
        "kda_state": storage_bytes(*(state.kda for state in states)),
    }

    def actual(row: Usage) -> int | None:
        if row.part in held:
            return held[row.part].get(row.device, 0)
        if row.device.type != "cuda":
            return None
        peak = torch.cuda.max_memory_allocated(row.device)
        if row.part == "workspace":
            return peak - sum(part.get(row.device, 0) for part in held.values())
        free, total = torch.cuda.mem_get_info(row.device)
        return total - free - peak

    return [Usage(row.device, row.part, row.predicted, actual(row)) for row in predicted_usage(placement)]


@dataclass(frozen=True)
class Offloaded:
    """Of decode steps while experts lie in the host's memory: experts that layers chose, each counted once a step, and
    those of them that were not on the card."""

    chosen: int
    missing: int

    def since(self, earlier: "Offloaded") -> "Offloaded":
        return Offloaded(self.chosen - earlier.chosen, self.missing - earlier.missing)


def count_offloaded(weights: EngineWeights) -> Offloaded | None:
    """Since the model was loaded; None where all experts are on cards. Waits for the cards."""
    packed = (layer.model.mlp.experts for layer in weights.layers if isinstance(layer.model.mlp, PackedMoE))
    totals = [e.offload.totals.tolist() for e in packed if isinstance(e, QuantExperts) and e.offload]
    return Offloaded(sum(t[1] for t in totals), sum(t[2] for t in totals)) if totals else None


@dataclass(frozen=True)
class Traffic:
    """What a decode step must move at least: weights read once, caches read, states read and written."""

    always_active: int
    routed_experts: int
    latent_cache: int
    kda_state: int

    @property
    def total(self) -> int:
        return self.always_active + self.routed_experts + self.latent_cache + self.kda_state


def step_traffic(
    config: KimiLinearConfig, sizes: WeightSizes, batch: int, context: int, cache_bits: int, activation_bytes: int = 2
) -> Traffic:
    """A step of `batch` sequences with `context` tokens each. Experts count that uniform routing chooses on average."""
    chosen = 1 - (1 - config.top_k / config.num_experts) ** batch
    routed, mla = sum(sizes.routed), len(config.mla_layers)
    return Traffic(
        always_active=sum(sizes.layers) - routed + sizes.final,
        routed_experts=round(routed * chosen),
        latent_cache=batch * context * mla * latent_bytes(config, cache_bits, activation_bytes),
        kda_state=2 * batch * (config.num_layers - mla) * kda_state_bytes(config, activation_bytes),
    )
