"""h + delta and its RMSNorm, with a small linear map of it for few tokens; the gated norm of heads."""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Rows of a linear map that a program of its norm has: few, so that a map of some hundred spreads over a card.
LINEAR_ROWS = 2


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


@triton.jit
def norm_linear_kernel(
    h, h_stride, delta, delta_stride, weight, proj, total, normed, out, tokens, width, rows, eps,
    BN: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """out [T, rows] = norm · projᵀ; grid (tiles of BN rows,). Each program makes the norm, one stores it."""
    DTYPE: tl.constexpr = h.dtype.element_ty
    # All are [BN, BT, BC], of which a weight or a token has one: alike in registers, so that nothing moves.
    n = (tl.program_id(0) * BN + tl.arange(0, BN))[:, None, None]
    t = tl.arange(0, BT)[None, :, None]
    c = tl.arange(0, BC)[None, None, :]
    w = ()
    scale = ()
    for i in tl.static_range(CHUNKS):
        inside = i * BC + c < width
        w = w + (tl.load(proj + n * width + i * BC + c, mask=inside & (n < rows), other=0.0),)  # noqa: RUF005
        scale = scale + (tl.load(weight + i * BC + c, mask=inside, other=0.0),)  # noqa: RUF005
    # Or the compiler would fetch the map, which comes from far, only when the sum is there.
    tl.debug_barrier()
    x = ()
    for i in tl.static_range(CHUNKS):
        inside = (i * BC + c < width) & (t < tokens)
        x = x + (tl.load(h + t * h_stride + i * BC + c, mask=inside, other=0.0),)  # noqa: RUF005
    if delta is not None:
        h_parts = x
        d = ()
        for i in tl.static_range(CHUNKS):
            inside = (i * BC + c < width) & (t < tokens)
            d = d + (tl.load(delta + t * delta_stride + i * BC + c, mask=inside, other=0.0),)  # noqa: RUF005
        x = ()
        for i in tl.static_range(CHUNKS):
            x = x + ((h_parts[i].to(tl.float32) + d[i].to(tl.float32)).to(DTYPE),)  # noqa: RUF005
    squares = x[0].to(tl.float32) * x[0].to(tl.float32)
    for i in tl.static_range(1, CHUNKS):
        squares += x[i].to(tl.float32) * x[i].to(tl.float32)
    factor = tl.rsqrt(tl.sum(squares, 2) / width + eps)[:, :, None]
    acc = tl.zeros([BN, BT, BC], tl.float32)
    for i in tl.static_range(CHUNKS):
        quotient = (x[i].to(tl.float32) * factor).to(DTYPE).to(tl.float32)
        y = (quotient * scale[i].to(tl.float32)).to(DTYPE)
        acc += w[i].to(tl.float32) * y.to(tl.float32)
        if tl.program_id(0) == 0:
            to = t * width + i * BC + c
            inside = (i * BC + c < width) & (t < tokens)
            if delta is not None:
                tl.store(total + to, x[i], mask=inside)
            tl.store(normed + to, y, mask=inside)
    to = out + t * rows + n
    tl.store(to, tl.sum(acc, 2, keep_dims=True).to(DTYPE), mask=(n < rows) & (t < tokens))


def add_rms_norm_linear(
    h_TC: Tensor, delta_TC: Tensor | None, weight_C: Tensor, eps: float, proj_NC: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(h + delta, its norm, norm · projᵀ) of few tokens. Rows of h and delta may be strided."""
    (tokens, width), rows = h_TC.shape, len(proj_NC)
    normed = torch.empty(tokens, width, dtype=h_TC.dtype, device=h_TC.device)
    total = None if delta_TC is None else torch.empty_like(normed)
    out = torch.empty(tokens, rows, dtype=h_TC.dtype, device=h_TC.device)
    block = min(1024, triton.next_power_of_2(width))
    norm_linear_kernel[(triton.cdiv(rows, LINEAR_ROWS),)](
        h_TC, h_TC.stride(0), delta_TC, 0 if delta_TC is None else delta_TC.stride(0), weight_C, proj_NC, total,
        normed, out, tokens, width, rows, eps, BN=LINEAR_ROWS, BT=triton.next_power_of_2(tokens), BC=block,
        CHUNKS=triton.cdiv(width, block), num_warps=4,
    )  # fmt: skip
    return h_TC if total is None else total, normed, out
