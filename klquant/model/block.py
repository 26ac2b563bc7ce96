"""One decoder layer: h += o(mix(norm(h))), then h += mlp(norm(h))."""

import torch
from torch import Tensor

from klquant.checkpoint.config import KimiLinearConfig
from klquant.model.kda import KDAState, kda_mix
from klquant.model.mla import LatentCache, Latents, mla_mix
from klquant.model.moe import mlp, moe
from klquant.model.norm import rms_norm
from klquant.model.weights import LayerWeights, MLAWeights, MoEWeights, PackedMoE, linear

State = KDAState | Latents


def new_state(cfg: KimiLinearConfig, layer: int, batch: int, dtype: torch.dtype, device: torch.device | str) -> State:
    """What layer `layer` remembers of `batch` sequences that have not begun."""
    kind = LatentCache.empty if cfg.is_mla(layer) else KDAState.zeros
    return kind(cfg, batch, dtype, device)


def block(cfg: KimiLinearConfig, w: LayerWeights, h_BSC: Tensor, state: State | None = None) -> Tensor:
    """The layer's output [B, S, C]. A state is read and updated in place."""
    return feed(cfg, w, attend(cfg, w, h_BSC, state))


def attend(cfg: KimiLinearConfig, w: LayerWeights, h_BSC: Tensor, state: State | None = None) -> Tensor:
    """The layer's first half: h + o(mix(norm(h)))."""
    mix = mla_mix if isinstance(w.attn, MLAWeights) else kda_mix
    mixed = mix(cfg, w.attn, rms_norm(h_BSC, w.input_norm, cfg.rms_eps), state)
    return h_BSC + linear(mixed, w.attn.o_proj)


def feed(cfg: KimiLinearConfig, w: LayerWeights, h_BSC: Tensor) -> Tensor:
    """The layer's second half: h + mlp(norm(h))."""
    x_TC = mlp_inputs(cfg, w, h_BSC)
    y_TC = moe(cfg, w.mlp, x_TC) if isinstance(w.mlp, MoEWeights | PackedMoE) else mlp(w.mlp, x_TC)
    return h_BSC + y_TC.view_as(h_BSC)


def mlp_inputs(cfg: KimiLinearConfig, w: LayerWeights, h_BSC: Tensor) -> Tensor:
    """What router and MLP of the layer read, [T, C]."""
    return rms_norm(h_BSC, w.post_norm, cfg.rms_eps).flatten(0, 1)
