"""h + delta and its RMSNorm, one program a token."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def normalize(x, weight, width, eps, DTYPE: tl.constexpr):
    """FP32 values x, zeros past `width` → x / rms(x), rounded to DTYPE, times the loaded weight; FP32."""
    quotient = (x * tl.rsqrt(tl.sum(x * x, 0) / width + eps)).to(DTYPE).to(tl.float32)
    return quotient * weight.to(tl.float32)


@triton.jit
def add_rms_norm_kernel(
    h, h_stride, delta, delta_stride, weight, total, normed, width, eps, BLOCK: tl.constexpr
):  # fmt: skip
    """total [T, width] = h + delta, unless there is no delta, and its norm; grid (tokens,)."""
    DTYPE: tl.constexpr = h.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    inside = c < width
    w = tl.load(weight + c, mask=inside, other=0.0)
    x = tl.load(h + token * h_stride + c, mask=inside, other=0.0)
    if delta is not None:
        d = tl.load(delta + token * delta_stride + c, mask=inside, other=0.0)
        x = (x.to(tl.float32) + d.to(tl.float32)).to(DTYPE)
        tl.store(total + token * width + c, x, mask=inside)
    y = normalize(x.to(tl.float32), w, width, eps, DTYPE)
    tl.store(normed + token * width + c, y.to(DTYPE), mask=inside)


def add_rms_norm(h_TC: Tensor, delta_TC: Tensor | None, weight_C: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(h + delta, its norm). Rows of h and delta may be strided."""
    tokens, width = h_TC.shape
    normed = torch.empty(tokens, width, dtype=h_TC.dtype, device=h_TC.device)
    total = None if delta_TC is None else torch.empty_like(normed)
    block = triton.next_power_of_2(width)
    add_rms_norm_kernel[(tokens,)](
        h_TC, h_TC.stride(0), delta_TC, 0 if delta_TC is None else delta_TC.stride(0), weight_C, total, normed, width,
        eps, BLOCK=block, num_warps=min(8, max(1, block // 256)),
    )  # fmt: skip
    return h_TC if total is None else total, normed
