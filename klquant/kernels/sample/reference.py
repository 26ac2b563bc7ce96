"""Gumbel noise without state, in plain torch.

Its 32-bit arithmetic is done in int64, so that every device gives the same bits.
"""

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
GOLDEN = 0x9E3779B1  # odd, near 2³²/φ: neighbouring tokens start far apart


def perturb(
    z_BV: Tensor, temperature_B: Tensor, seed_B: Tensor, position_B: Tensor, token_BV: Tensor | None
) -> Tensor:  # fmt: skip
    """z / temperature + Gumbel noise, FP32, whose largest is a draw from softmax(z / temperature).

    token [B, V]: which token each column is, None where they are in order. Rows at temperature 0 stay as they are.
    """
    if token_BV is None:
        token_BV = torch.arange(z_BV.shape[1], device=z_BV.device)
    t_B1 = temperature_B[:, None]
    drawn = z_BV.float() / torch.where(t_B1 > 0, t_B1, 1) + gumbel(seed_B, position_B.long(), token_BV)
    return torch.where(t_B1 > 0, drawn, z_BV.float())


def draw(
    z_BV: Tensor, temperature_N: Tensor | None, seed_N: Tensor, slot_B: Tensor, position_B: Tensor
) -> Tensor:  # fmt: skip
    """`klquant.kernels.sample.dispatch.draw`."""
    best_B, column_B = z_BV.max(-1)  # NaN wins
    if temperature_N is not None:
        column_B = perturb(z_BV, temperature_N[slot_B], seed_N[slot_B], position_B, None).argmax(-1)
    return torch.where(best_B.isfinite(), column_B, -1)


def draw_narrowed(
    z_BV: Tensor, seen_NV: Tensor, temperature_N: Tensor, top_k_N: Tensor, top_p_N: Tensor, min_p_N: Tensor,
    penalty_N: Tensor, seed_N: Tensor, slot_B: Tensor, position_B: Tensor,
) -> Tensor:  # fmt: skip
    """`klquant.kernels.sample.dispatch.draw_narrowed`: sorts the vocabulary."""
    good_B = z_BV.max(-1).values.isfinite()  # NaN wins
    penalty_B1, temperature_B = penalty_N[slot_B, None], temperature_N[slot_B]
    z_BV = z_BV.float()
    z_BV = torch.where(seen_NV[slot_B], torch.where(z_BV > 0, z_BV / penalty_B1, z_BV * penalty_B1), z_BV)
    z_BV, order_BV = z_BV.sort(dim=-1, descending=True, stable=True)
    rank_V = torch.arange(z_BV.shape[1], device=z_BV.device)
    z_BV = z_BV.masked_fill(rank_V >= top_k_N[slot_B, None], float("-inf"))
    p_BV = (z_BV / torch.where(temperature_B > 0, temperature_B, 1)[:, None]).softmax(-1)
    before_BV = p_BV.cumsum(-1) - p_BV
    out_BV = (before_BV >= top_p_N[slot_B, None]) | (p_BV < min_p_N[slot_B, None] * p_BV[:, :1])
    # The first always stays.
    z_BV = z_BV.masked_fill(out_BV & (rank_V > 0), float("-inf"))
    rank_B1 = perturb(z_BV, temperature_B, seed_N[slot_B], position_B, order_BV).argmax(-1, keepdim=True)
    token_B = order_BV.gather(-1, rank_B1)[:, 0]
    seen_NV[slot_B, token_B] |= good_B
    return torch.where(good_B, token_B, -1)


def gumbel(seed_B: Tensor, position_B: Tensor, token: Tensor) -> Tensor:
    """Gumbel noise [B, V] FP32 of tokens [V] or [B, V] int64: −log(−log u), u a hash in (0, 1)."""
    row_B = _mix((seed_B & MASK) ^ _mix(((seed_B >> 32) & MASK) ^ _mix(position_B & MASK)))
    first_B1, second_B1 = _mix(row_B)[:, None], _mix(row_B + GOLDEN & MASK)[:, None]
    x_BV = _mix(_mix((token * GOLDEN & MASK) ^ first_B1) + second_B1 & MASK)
    # −log u is computed as −log(1 − u): near 0, where the noise is largest, u is finest. It must not round to 1.
    u_BV = ((x_BV.float() + 0.5) * 2.0**-32).clamp_max(1 - 2.0**-24)
    return -(-torch.log1p(-u_BV)).log()


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit numbers whose every bit depends on all: the last step of MurmurHash3."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B & MASK
    x = (x ^ (x >> 13)) * 0xC2B2AE35 & MASK
    return x ^ (x >> 16)
