"""Latents into their pages: the norm and, for 8-bit pages, a scale of each token, one program a token."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from klquant.kernels.mla.pages import CODE_MAX, LatentPages
from klquant.kernels.norm.reference import LATENT_EPS
from klquant.kernels.norm.triton import normalize


@triton.jit
def _encode(x, FORMAT: tl.constexpr):
    """|x| ≤ the largest code → the nearest code in int8, ties to even."""
    if FORMAT == "fp8":
        # 2^-120 makes an FP32 number's exponent field the one E4M3 has, subnormal numbers included.
        bits = (tl.abs(x) * 2.0**-120).to(tl.int32, bitcast=True)
        code = (bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20
        return (code | tl.where(x < 0, 0x80, 0)).to(tl.int8)
    else:
        # In this range FP32 numbers are integers.
        return ((x + 12582912.0) - 12582912.0).to(tl.int8)


@triton.jit
def write_latent_kernel(
    kv_a, kv_a_stride, weight, position, data, scale, eps,
    RANK: tl.constexpr, ROPE: tl.constexpr, CODE_MAX: tl.constexpr, FORMAT: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """One program a token."""
    DTYPE: tl.constexpr = kv_a.dtype.element_ty
    if EARLY:
        gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    at = tl.load(position + token)
    if at >= 0:
        r = tl.arange(0, RANK)
        e = RANK + tl.arange(0, ROPE)
        x = tl.load(kv_a + token * kv_a_stride + r).to(tl.float32)
        rope = tl.load(kv_a + token * kv_a_stride + e).to(tl.float32)
        latent = normalize(x, tl.load(weight + r), RANK, eps, DTYPE).to(DTYPE).to(tl.float32)
        row = data + at * (RANK + ROPE)
        if FORMAT == "plain":
            tl.store(row + r, latent.to(data.dtype.element_ty))
            tl.store(row + e, rope.to(data.dtype.element_ty))
        else:
            largest = tl.maximum(tl.max(tl.abs(latent), 0), tl.max(tl.abs(rope), 0))
            step = tl.div_rn(largest, CODE_MAX)
            # A latent of zeros has codes 0 whatever its scale.
            divisor = tl.maximum(step, 2.0**-126)
            tl.store(row + r, _encode(tl.div_rn(latent, divisor), FORMAT))
            tl.store(row + e, _encode(tl.div_rn(rope, divisor), FORMAT))
            tl.store(scale + at, step)


def write_latent(kv_a: Tensor, norm_weight: Tensor, pages: LatentPages, position_T: Tensor, early: bool) -> None:
    """One launch. early: the next one may start meanwhile, and wait (from sm90 on)."""
    rank = len(norm_weight)
    coded = pages.scale is not None
    write_latent_kernel[(len(kv_a),)](
        kv_a, kv_a.stride(0), norm_weight, position_T, pages.data.view(torch.int8) if coded else pages.data,
        pages.scale, LATENT_EPS, RANK=rank, ROPE=kv_a.shape[1] - rank, CODE_MAX=CODE_MAX.get(pages.data.dtype, 0.0),
        FORMAT=pages.format, EARLY=early, num_warps=4,
    )  # fmt: skip
