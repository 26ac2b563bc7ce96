"""h + delta and its RMSNorm, one program a token; the gated norm of heads, one program for some of them."""

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


@triton.jit(do_not_specialize=["rows"])
def gated_rms_norm_kernel(x, gate, weight, out, rows, eps, D: tl.constexpr, BLOCK: tl.constexpr, BR: tl.constexpr):
    """out [rows, D]; grid (tiles of BR rows,)."""
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    d = tl.arange(0, BLOCK)
    inside = (r < rows)[:, None] & (d < D)[None, :]
    at = r[:, None].to(tl.int64) * D + d[None, :]
    w = tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)
    y = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    y = y * tl.rsqrt(tl.sum(y * y, 1) / D + eps)[:, None] * w[None, :] * tl.sigmoid(g)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)


def gated_rms_norm(x: Tensor, gate: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """One launch."""
    assert x.is_contiguous() and gate.is_contiguous(), "the heads of a position must be contiguous"
    dim = x.shape[-1]
    block = triton.next_power_of_2(dim)
    rows, out = x.numel() // dim, torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    tile = max(1, 4096 // block)
    gated_rms_norm_kernel[(triton.cdiv(rows, tile),)](
        x, gate, weight_D, out, rows, eps, D=dim, BLOCK=block, BR=tile, num_warps=4
    )
    return out
