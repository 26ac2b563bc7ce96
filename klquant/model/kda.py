"""Kimi Delta Attention: short convolutions, gates, the delta rule, the gated norm. arXiv 2510.26692."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from klquant.checkpoint.config import KimiLinearConfig
from klquant.kernels.kda.dispatch import prefill_inputs
from klquant.kernels.kda.reference import short_conv
from klquant.kernels.norm import dispatch as norm_dispatch
from klquant.model import fused
from klquant.model.delta import delta_rule, gated_delta_rule, log_decay
from klquant.model.norm import gated_rms_norm, widen
from klquant.model.weights import KDAWeights, Linear, linear


@dataclass(frozen=True)
class KDAState:
    """What a KDA layer remembers of its sequences; its tensors are updated in place.

    conv [B, 3·F, taps − 1]: the last inputs of the q, k and v convolutions, in the activations' dtype.
    s [B, H, D, D]: the delta rule's state, key × value, FP32.
    """

    conv: Tensor
    s: Tensor

    @classmethod
    def zeros(cls, cfg: KimiLinearConfig, batch: int, dtype: torch.dtype, device: torch.device | str) -> "KDAState":
        conv = torch.zeros(batch, 3 * cfg.kda_width, cfg.conv_width - 1, dtype=dtype, device=device)
        wide = torch.promote_types(dtype, torch.float32)
        return cls(conv, torch.zeros(batch, cfg.kda_heads, cfg.kda_dim, cfg.kda_dim, dtype=wide, device=device))


def kda_mix(cfg: KimiLinearConfig, w: KDAWeights, x_BSC: Tensor, state: KDAState | None = None) -> Tensor:
    """All of the layer but its output projection: normed input [B, S, C] → [B, S, F] in the same dtype.

    With a state the sequences go on from it, and it is left as after the last position.
    """
    if fused.serves(x_BSC):
        return _fused_mix(cfg, w, x_BSC, state)
    heads = (cfg.kda_heads, cfg.kda_dim)
    qkv_BSF = torch.cat([linear(x_BSC, p) for p in (w.q_proj, w.k_proj, w.v_proj)], -1)
    taps_FW = torch.cat([w.q_conv, w.k_conv, w.v_conv])
    mixed_BSF = F.silu(short_conv(qkv_BSF, taps_FW, state.conv if state else None)).to(x_BSC.dtype)
    q, k, v = (y.unflatten(-1, heads) for y in mixed_BSF.chunk(3, -1))
    raw_BSF = linear(linear(x_BSC, w.f_a_proj), w.f_b_proj)
    g = log_decay(raw_BSF, w.A_log, w.dt_bias).unflatten(-1, heads)
    beta_BSH = torch.sigmoid(widen(linear(x_BSC, w.b_proj)))
    o, s = delta_rule(q, k, v, g, beta_BSH, state.s if state else None)
    if state:
        state.s.copy_(s)
    gate = linear(linear(x_BSC, w.g_a_proj), w.g_b_proj).unflatten(-1, heads)
    return gated_rms_norm(o, gate, w.o_norm, cfg.rms_eps).flatten(-2).to(x_BSC.dtype)


def _fused_mix(cfg: KimiLinearConfig, w: KDAWeights, x_BSC: Tensor, state: KDAState | None) -> Tensor:
    """`kda_mix` in four kernels between the projections, which write nothing in FP32 but β and the state."""
    heads = (cfg.kda_heads, cfg.kda_dim)
    taps_FW = torch.cat([w.q_conv, w.k_conv, w.v_conv])
    qkv_BSF = _side_by_side(x_BSC, w.q_proj, w.k_proj, w.v_proj)
    q, k, v, beta_BSH = prefill_inputs(qkv_BSF, linear(x_BSC, w.b_proj), taps_FW, state.conv if state else None)
    del qkv_BSF  # as large as what was made of it
    raw = linear(linear(x_BSC, w.f_a_proj), w.f_b_proj).unflatten(-1, heads)
    o, s = gated_delta_rule(q, k, v, raw, w.A_log, w.dt_bias, beta_BSH, state.s if state else None)
    if state:
        state.s.copy_(s)
    gate = linear(linear(x_BSC, w.g_a_proj), w.g_b_proj).unflatten(-1, heads)
    return norm_dispatch.gated_rms_norm(o.contiguous(), gate, w.o_norm, cfg.rms_eps).flatten(-2)


def _side_by_side(x: Tensor, *maps: Linear) -> Tensor:
    """What the maps make of x, one behind the other: one product where they are tensors."""
    if all(isinstance(m, Tensor) for m in maps):
        return linear(x, torch.cat(maps))
    return torch.cat([linear(x, m) for m in maps], -1)
