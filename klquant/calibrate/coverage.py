"""How much calibration text the routed experts need: enough that the first-percentile expert sees its minimum.

A probe of the first windows runs through the unquantized model and counts where the router sends each token; from the
rate of the first-percentile expert of each layer follows how many windows to draw.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor

from klquant.calibrate.text import Calibration, CalibrationPool
from klquant.calibrate.walk import WalkSettings
from klquant.model.block import attend, feed, mlp_inputs
from klquant.model.forward import EMBEDDING
from klquant.model.moe import route
from klquant.model.weights import LayerWeights, MoEWeights, WeightSource
from klquant.recipe.schema import CalibrationParams

PROBE_TOKENS = 16_384
PERCENTILE = 0.01


@dataclass(frozen=True)
class Coverage:
    """What the probe found: `rate`, tokens that the first-percentile expert of the worst layer gets out of `probed`
    tokens; and what followed: `windows` drawn where its minimum asks for `wanted`."""

    probed: int
    rate: float
    windows: int
    wanted: int


def whole_windows(params: CalibrationParams) -> tuple[int, int]:
    """Windows that hold `params.tokens`, and the most that are drawn for rare experts: tokens are rounded up to whole
    windows, the most is what `params.max_tokens` has room for."""
    least = ceil(params.tokens / params.window)
    return least, max(least, params.max_tokens // params.window)


def draw_windows(
    pool: CalibrationPool,
    source: WeightSource,
    params: CalibrationParams,
    settings: WalkSettings,
    progress: Callable[[str, float], None],
) -> tuple[Calibration, Coverage | None]:
    """Take windows from `pool` until the experts are covered or `params.max_tokens` is reached (`whole_windows`).

    Without a minimum (`min_expert_tokens` 0) it takes those of `params.tokens` and probes nothing.
    """
    base, most = whole_windows(params)
    ids = pool.take(base)
    if not params.min_expert_tokens or not ids.numel():
        return pool.calibration(), None
    probe = ids[: max(1, PROBE_TOKENS // params.window)]
    rate = _percentile_rate(source, probe, settings, progress)
    tokens = params.min_expert_tokens / rate if rate else float("inf")
    wanted = min(most, max(base, ceil(min(tokens, most * params.window) / params.window)))
    pool.take(wanted - base)
    calibration = pool.calibration()
    return calibration, Coverage(probe.numel(), rate, len(calibration.ids), wanted)


def _percentile_rate(
    source: WeightSource, ids_WS: Tensor, settings: WalkSettings, progress: Callable[[str, float], None]
) -> float:
    """Share of tokens that the first-percentile expert of the worst layer gets."""
    cfg = source.config
    h_WSC = F.embedding(ids_WS, source.weight(EMBEDDING, settings.dtype))
    worst = 1.0
    for layer in range(cfg.num_layers):
        progress("probing the router", layer / cfg.num_layers)
        w = LayerWeights.load(source, layer, settings.dtype, settings.device)
        counts = torch.zeros(cfg.num_experts, dtype=torch.int64)
        for part in h_WSC.split(settings.batch):
            h = attend(cfg, w, part.to(settings.device))
            if isinstance(w.mlp, MoEWeights):
                _, expert = route(cfg, w.mlp, mlp_inputs(cfg, w, h))
                counts += torch.bincount(expert.flatten().cpu(), minlength=cfg.num_experts)
            part.copy_(feed(cfg, w, h))
        if isinstance(w.mlp, MoEWeights):
            worst = min(worst, float(counts.double().quantile(PERCENTILE)) / ids_WS.numel())
        del w
    return worst
