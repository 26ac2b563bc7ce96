"""Kimi Delta Attention: short convolutions, gates, the delta rule, the gated norm. arXiv 2510.26692."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from klquant.checkpoint.config import KimiLinearConfig
from klquant.model.delta import delta_rule
from klquant.model.norm import gated_rms_norm, widen
from klquant.model.weights import KDAWeights, linear


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
    heads = (cfg.kda_heads, cfg.kda_dim)
    qkv_BSF = torch.cat([linear(x_BSC, p) for p in (w.q_proj, w.k_proj, w.v_proj)], -1)
    taps_FW = torch.cat([w.q_conv, w.k_conv, w.v_conv])
    mixed_BSF = F.silu(short_conv(qkv_BSF, taps_FW, state.conv if state else None)).to(x_BSC.dtype)
    q, k, v = (y.unflatten(-1, heads) for y in mixed_BSF.chunk(3, -1))
    g = forget_gate(w, x_BSC).unflatten(-1, heads)
    beta_BSH = torch.sigmoid(widen(linear(x_BSC, w.b_proj)))
    o, s = delta_rule(q, k, v, g, beta_BSH, state.s if state else None)
    if state:
        state.s.copy_(s)
    gate = linear(linear(x_BSC, w.g_a_proj), w.g_b_proj).unflatten(-1, heads)
    return gated_rms_norm(o, gate, w.o_norm, cfg.rms_eps).flatten(-2).to(x_BSC.dtype)


def forget_gate(w: KDAWeights, x_BSC: Tensor) -> Tensor:
    """g = −exp(A_log) · softplus(f_b(f_a(x)) + dt_bias): the log decay [B, S, F] of each state row, FP32, ≤ 0."""
    raw = widen(linear(linear(x_BSC, w.f_a_proj), w.f_b_proj)) + w.dt_bias
    rate_F = w.A_log.exp().repeat_interleave(raw.shape[-1] // w.A_log.shape[0])
    return -rate_F * F.softplus(raw)


def short_conv(x_BSF: Tensor, taps_FW: Tensor, tail: Tensor | None = None) -> Tensor:
    """Causal convolution of each channel: y_t = Σ_i taps_i · x_{t−W+1+i}, in at least FP32.

    `tail` [B, F, W − 1] holds the inputs before the first position (zeros without it) and is replaced by the last ones.
    """
    B, S, width = x_BSF.shape
    W = taps_FW.shape[1]
    past = x_BSF.new_zeros(B, W - 1, width) if tail is None else tail.mT
    padded = torch.cat([past, x_BSF], 1)
    if tail is not None:
        tail.copy_(padded[:, S:].mT)
    padded, taps_WF = widen(padded), widen(taps_FW).t().contiguous()
    y = padded[:, :S] * taps_WF[0]
    for i in range(1, W):
        y = torch.addcmul(y, padded[:, i : i + S], taps_WF[i])
    return y
