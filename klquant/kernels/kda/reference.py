"""KDA between its projections in plain torch, a step or a chunk: the path of a CPU. arXiv 2510.26692."""

import torch
import torch.nn.functional as F
from torch import Tensor

from klquant.kernels.kda.borders import Borders
from klquant.kernels.kda.weights import KDADecode
from klquant.kernels.norm.reference import gated_rms_norm, l2_norm, widen


def kda_decode(
    qkv: Tensor, low: Tensor, w: KDADecode, conv_pool: Tensor, s_pool: Tensor, slot_B: Tensor, eps: float
) -> Tensor:
    """`klquant.kernels.kda.dispatch.kda_decode`: rounded where it leaves the kernels, and nowhere before."""
    out_BF = qkv.new_zeros(len(qkv), qkv.shape[1] // 3)
    lives = slot_B >= 0
    slot = slot_B[lives].long()
    qkv, low = qkv[lives], low[lives]
    _, H, D, _ = s_pool.shape
    rank = w.f_b.shape[1]

    window = torch.cat([conv_pool[slot], qkv[..., None]], -1)
    conv_pool[slot] = window[..., 1:]
    mixed = F.silu((widen(window) * widen(w.taps)).sum(-1))
    q, k, v = (x.unflatten(-1, (H, D)) for x in mixed.chunk(3, -1))

    f_a, g_a, b = low[:, :rank], low[:, rank : 2 * rank], low[:, 2 * rank : 2 * rank + H]
    raw = (F.linear(widen(f_a), widen(w.f_b)) + w.dt_bias).unflatten(-1, (H, D))
    decay = (-w.A_log.exp()[:, None] * F.softplus(raw)).exp()

    q, k = l2_norm(q) * D**-0.5, l2_norm(k)
    s = s_pool[slot] * decay[..., None]
    update = torch.sigmoid(widen(b))[..., None] * (v - torch.einsum("bhk,bhkv->bhv", k, s))
    s = s + k[..., None] * update[..., None, :]
    s_pool[slot] = s
    o = torch.einsum("bhk,bhkv->bhv", q, s)
    gate = F.linear(widen(g_a), widen(w.g_b)).unflatten(-1, (H, D))
    out_BF[lives] = gated_rms_norm(o, gate, w.o_norm, eps).flatten(-2).to(qkv.dtype)
    return out_BF


def prefill_inputs(
    qkv_BSF: Tensor, b_BSH: Tensor, taps_FW: Tensor, tail_BFW: Tensor | None, borders: Borders | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`klquant.kernels.kda.dispatch.prefill_inputs`, in the dtype of the activations."""
    if borders and borders.host is None:
        count = int(borders.device[1])
        if not count:
            return tuple(x.new_zeros(x.shape) for x in prefill_inputs(qkv_BSF, b_BSH, taps_FW, None))
        found = prefill_inputs(qkv_BSF[:, :count], b_BSH[:, :count], taps_FW, tail_BFW)
        return tuple(F.pad(x, [0, 0] * (x.ndim - 2) + [0, b_BSH.shape[1] - count]) for x in found)
    if borders:
        each = [
            prefill_inputs(qkv_BSF[:, a:b], b_BSH[:, a:b], taps_FW, None if tail_BFW is None else tail_BFW[n : n + 1])
            for n, (a, b) in enumerate(borders.spans)
        ]
        return tuple(torch.cat(x, 1) for x in zip(*each, strict=True))
    heads = b_BSH.shape[-1]
    mixed_BSF = F.silu(short_conv(qkv_BSF, taps_FW, tail_BFW)).to(qkv_BSF.dtype)
    q, k, v = (x.unflatten(-1, (heads, -1)) for x in mixed_BSF.chunk(3, -1))
    return l2_norm(q).to(q.dtype), l2_norm(k).to(k.dtype), v, torch.sigmoid(widen(b_BSH))


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
