"""The search for scales in one pass over the weight, and the least-squares refit of scales without large temporaries.

Shape suffixes as in `klquant.quantize.gptq`; B = batch of weights (experts), G = groups.
"""

import math
from dataclasses import replace
from functools import cache

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from klquant.core.grid import SCALE_DTYPE, Quantized
from klquant.core.spec import WeightSpec
from klquant.quantize.factor import solve_systems
from klquant.quantize.kernels.columns import batches
from klquant.quantize.kernels.numeric import round_between, round_bf16

# Weights in registers of one program of the search; a longer group has a program of its own.
TILE = 4096
LONGEST_GROUP = 1 << 14
EQUATION_ROWS = 128


@triton.jit
def search_groups(
    w, importance, factors, best_scale, best_zero, n, groups, width, count,
    QMIN: tl.constexpr, QMAX: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Of ROWS rows of one group: the scale, among `count` shrunken ranges, with the least weighted squared error.

    w [B, N, G, width] FP32; importance [B, G, width] FP32 or None; factors [count] FP32; best_scale [B, N, G] BF16;
    best_zero [B, N, G] int8, or None for a symmetric grid. The first of equal errors wins.
    """
    group, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inputs = tl.arange(0, WIDTH)
    inside = (rows < n)[:, None] & (inputs < width)[None, :]
    place = (b * n + rows) * groups + group
    x = tl.load(w + place[:, None] * width + inputs[None, :], mask=inside, other=0.0)
    if importance is not None:
        weight = tl.load(importance + (b * groups + group) * width + inputs, mask=inputs < width, other=0.0)
    low, high = tl.minimum(tl.min(x, axis=1), 0.0), tl.maximum(tl.max(x, axis=1), 0.0)
    if best_zero is None:
        full = tl.maximum(tl.div_rn(-low, tl.full([ROWS], -QMIN, tl.float32)),
                          tl.div_rn(high, tl.full([ROWS], QMAX, tl.float32)))  # fmt: skip
    else:
        full = tl.div_rn(high - low, tl.full([ROWS], QMAX - QMIN, tl.float32))
    full = tl.where(full > 0, full, 1.0)
    least = tl.full([ROWS], float("inf"), tl.float32)
    scale, zero = tl.full([ROWS], 1.0, tl.float32), tl.zeros([ROWS], tl.float32)
    for i in range(count):
        factor = tl.load(factors + i)
        s = round_bf16(full * factor)
        z = tl.zeros([ROWS], tl.float32)
        if best_zero is not None:
            z = round_between(QMIN - tl.div_rn(low * factor, s), QMIN, QMAX)
        steps = tl.div_rn(x, tl.broadcast_to(s[:, None], [ROWS, WIDTH]))
        error = round_between(steps, (QMIN - z)[:, None], (QMAX - z)[:, None]) * s[:, None] - x
        error *= error
        if importance is not None:
            error *= weight[None, :]
        error = tl.sum(error, axis=1)
        better = error < least
        least = tl.where(better, error, least)
        scale, zero = tl.where(better, s, scale), tl.where(better, z, zero)
    tl.store(best_scale + place, scale.to(tl.bfloat16), mask=rows < n)
    if best_zero is not None:
        tl.store(best_zero + place, zero.to(tl.int8), mask=rows < n)


def search(
    w: Tensor, spec: WeightSpec, weight: Tensor | None, shrink: list[float]
) -> tuple[Tensor, Tensor | None] | None:
    """`klquant.quantize.rtn._search` for w [B, N, G, width] and weight [B, 1, G, width].

    None when a group is too long for the registers.
    """
    b, n, groups, width = w.shape
    padded = triton.next_power_of_2(width)
    if padded > LONGEST_GROUP:
        return None
    scale = torch.empty(b, n, groups, dtype=SCALE_DTYPE, device=w.device)
    zero = None if spec.symmetric else torch.empty(b, n, groups, dtype=torch.int8, device=w.device)
    rows, factors = max(1, TILE // padded), _factors(tuple(shrink), w.device)
    with torch.cuda.device_of(w):
        search_groups[(triton.cdiv(n, rows), groups, b)](
            w.contiguous(), None if weight is None else weight.contiguous(), factors, scale, zero,
            n, groups, width, len(shrink),
            QMIN=spec.qmin, QMAX=spec.qmax, ROWS=rows, WIDTH=padded, num_warps=max(4, padded // 1024),
        )  # fmt: skip
    return scale, zero


@cache
def _factors(shrink: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(shrink, device=device)


@triton.jit
def normal_equations(
    steps, h, r, a, b, n, k, groups, width, h_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr
):
    """Row by row A_gg' = c_g H_gg' c_g'ᵀ and b_g = c_g r_gᵀ, for one g and all g' ≥ g.

    steps [E, N, K] BF16: c, the integers code − zero, exact in BF16; h [E, K, K] FP32, symmetric; r [E, N, K] FP32;
    a [E, N, G, G] and b [E, N, G] FP32. COLUMNS and INNER divide `width`. H is split into two BF16 parts (16 bits),
    which tensor cores multiply and add up in FP32.
    """
    g, e = tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns, inner = tl.arange(0, COLUMNS), tl.arange(0, INNER)
    # Rows past the last one are computed as copies of it and not stored.
    place = tl.minimum(rows, n - 1)[:, None] * k
    steps += e * n * k
    h += e * h_stride
    r += e * n * k
    out = e * n + rows
    total = tl.zeros([ROWS], tl.float32)
    for at in range(g * width, (g + 1) * width, COLUMNS):
        c = tl.load(steps + place + (at + columns)[None, :]).to(tl.float32)
        total += tl.sum(c * tl.load(r + place + (at + columns)[None, :]), axis=1)
    tl.store(b + out * groups + g, total, mask=rows < n)
    for other in range(g, groups):
        total = tl.zeros([ROWS], tl.float32)
        for at in range(other * width, (other + 1) * width, COLUMNS):
            acc = tl.zeros([ROWS, COLUMNS], tl.float32)
            for kk in range(g * width, (g + 1) * width, INNER):
                left = tl.load(steps + place + (kk + inner)[None, :])
                tile = tl.load(h + (kk + inner)[:, None] * k + (at + columns)[None, :])
                upper = tile.to(tl.bfloat16)
                acc = tl.dot(left, upper, acc)
                acc = tl.dot(left, (tile - upper.to(tl.float32)).to(tl.bfloat16), acc)
            total += tl.sum(acc * tl.load(steps + place + (at + columns)[None, :]).to(tl.float32), axis=1)
        tl.store(a + (out * groups + g) * groups + other, total, mask=rows < n)
        tl.store(a + (out * groups + other) * groups + g, total, mask=rows < n)


def refit_scales(w_ENK: Tensor, h_EKK: Tensor, q: Quantized) -> Quantized:
    """`klquant.quantize.gptq.refit_scales`, solved for the change of the scales: A δ = c·(w − ŵ) H, s = s_old + δ.

    What a change does to a row's loss is then −2 bᵀδ + δᵀA δ, without forming another product with H.
    """
    scale = torch.empty_like(q.scale)
    h_EKK = h_EKK.expand(w_ENK.shape[0], -1, -1)
    for part in batches(w_ENK.shape[0]):
        scale[part] = _refit(w_ENK[part], h_EKK[part], q[part])
    return replace(q, scale=scale)


def _refit(w_ENK: Tensor, h_EKK: Tensor, q: Quantized) -> Tensor:
    groups, width, old = q.scale.shape[-1], q.codes.shape[-1] // q.scale.shape[-1], q.scale.float()
    steps = q.codes.unflatten(-1, (groups, width)).float()
    if q.zero is not None:
        steps -= q.zero.unsqueeze(-1)
    d = w_ENK - (steps * old.unsqueeze(-1)).flatten(-2)
    a, b = equations(steps.to(torch.bfloat16).flatten(-2), h_EKK, d @ h_EKK, groups)
    diagonal = a.diagonal(dim1=-2, dim2=-1)
    ridge = 1e-6 * diagonal.mean(-1, keepdim=True).clamp_min(1e-20)
    diagonal += ridge
    # The ridge pulls toward scale nought, as it does when one solves for the scale itself.
    delta, info = solve_systems(a, (b - ridge * old).unsqueeze(-1))
    fitted = old + delta.squeeze(-1)
    usable = (info == 0).unsqueeze(-1) & torch.isfinite(fitted) & (fitted > 0)
    usable &= (fitted < 2 * old) & (fitted > 0.5 * old)
    fitted = torch.where(usable, fitted, old).to(SCALE_DTYPE)
    move = fitted.float() - old
    diagonal -= ridge
    change = ((a @ move.unsqueeze(-1)).squeeze(-1) * move - 2 * b * move).sum(-1, keepdim=True)
    return torch.where(change < 0, fitted, q.scale)


def equations(steps_ENK: Tensor, h_EKK: Tensor, r_ENK: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """A [E, N, G, G] and b [E, N, G] of `normal_equations`."""
    k = steps_ENK.shape[-1]
    if groups == 1 and k % 16:
        # A whole row of any length: products are made of 16 columns at least.
        pad = -k % 16
        steps_ENK, h_EKK, r_ENK = F.pad(steps_ENK, (0, pad)), F.pad(h_EKK, (0, pad, 0, pad)), F.pad(r_ENK, (0, pad))
    e, n, k = steps_ENK.shape
    if h_EKK.stride()[1:] != (k, 1):
        h_EKK = h_EKK.contiguous()
    a = torch.empty(e, n, groups, groups, device=r_ENK.device)
    b = torch.empty(e, n, groups, device=r_ENK.device)
    columns = math.gcd(k // groups, 128)
    with torch.cuda.device_of(a):
        normal_equations[(triton.cdiv(n, EQUATION_ROWS), groups, e)](
            steps_ENK.contiguous(), h_EKK, r_ENK.contiguous(), a, b, n, k, groups, k // groups, h_EKK.stride(0),
            ROWS=EQUATION_ROWS, COLUMNS=columns, INNER=min(32, columns), num_warps=8, num_stages=2,
        )  # fmt: skip
    return a, b
