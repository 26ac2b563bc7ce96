"""h + delta and its RMSNorm; the product of a norm and some rows of a map; the gated norm of heads."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from klquant.kernels.norm.parts import WIDE_TOKENS, Parts


@triton.jit
def normalize(x, weight, width, eps, DTYPE: tl.constexpr):
    """FP32 values x, zeros past `width` → x / rms(x), rounded to DTYPE, times the loaded weight; FP32."""
    quotient = (x * tl.rsqrt(tl.sum(x * x, 0) / width + eps)).to(DTYPE).to(tl.float32)
    return quotient * weight.to(tl.float32)


@triton.jit
def add_rms_norm_kernel(
    h, h_stride, delta, delta_stride, beside, weight, total, normed, turns, width, eps, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, TURNS: tl.constexpr,
):  # fmt: skip
    """total [T, width] = h + delta, unless there is no delta, and its norm; `turns` [T, TURNS] = 0. Grid (tokens,).

    ROWS > 0: a token's delta is so many rows and `beside`'s one, if any. h and total may be wider than normed.
    """
    DTYPE: tl.constexpr = h.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    inside = c < width
    w = tl.load(weight + c, mask=inside, other=0.0)
    x = tl.load(h + token * h_stride + c, mask=inside, other=0.0)
    if delta is not None:
        d = tl.load(delta + token * delta_stride + c, mask=inside, other=0.0).to(tl.float32)
        if ROWS > 0:
            # As combine_kernel does.
            for r in tl.static_range(1, ROWS):
                d += tl.load(delta + token * delta_stride + r * width + c, mask=inside, other=0.0).to(tl.float32)
            if beside is not None:
                d += tl.load(beside + token * width + c, mask=inside, other=0.0).to(tl.float32)
            d = d.to(DTYPE).to(tl.float32)
        x = (x.to(tl.float32) + d).to(DTYPE)
        tl.store(total + token * width + c, x, mask=inside)
    if turns is not None:
        tl.store(turns + token * TURNS + tl.arange(0, TURNS), 0)
    y = normalize(x.to(tl.float32), w, width, eps, DTYPE)
    tl.store(normed + token * width + c, y.to(normed.dtype.element_ty), mask=inside)


def add_rms_norm(
    h_TC: Tensor, delta_TC: Tensor | Parts | None, weight_C: Tensor, eps: float, turns: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(h + delta, its norm). Rows of h and of a delta that is not in parts may be strided."""
    tokens, width = h_TC.shape
    total, normed = sum_and_norm(h_TC, delta_TC, weight_C.dtype)
    delta, delta_stride, rows, beside = addends(delta_TC)
    block = triton.next_power_of_2(width)
    add_rms_norm_kernel[(tokens,)](
        h_TC, h_TC.stride(0), delta, delta_stride, beside, weight_C, total, normed, turns, width, eps, ROWS=rows,
        BLOCK=block, TURNS=0 if turns is None else turns.shape[1], num_warps=_warps(tokens, block),
    )  # fmt: skip
    return h_TC if total is None else total, normed


def _warps(tokens: int, block: int) -> int:
    """Of few tokens a thread has one piece of a row: what it waits for is all on its way at once."""
    return max(1, min(32, block // 128) if tokens <= WIDE_TOKENS else min(8, block // 256))


def addends(delta: Tensor | Parts | None) -> tuple[Tensor | None, int, int, Tensor | None]:
    """As kernels take it: (delta, elements from one token's to the next's, rows a token or 0, a row beside them)."""
    if isinstance(delta, Parts):
        return delta.rows_TRC, delta.rows_TRC.stride(0), delta.rows_TRC.shape[1], delta.beside_TC
    return delta, 0 if delta is None else delta.stride(0), 0, None


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
def columns(BC: tl.constexpr, EACH: tl.constexpr):
    """[1, 1, BC] whole numbers of which a thread is to have EACH neighbours, whatever the type of what it loads there.

    Left alone the compiler gives each type as many as 16 bytes hold, and moves what meets another.
    """
    return tl.max_contiguous(tl.arange(0, BC)[None, None, :], (1, 1, EACH))


@triton.jit
def norm_product(
    h, h_stride, delta, delta_stride, weight, proj, total, normed, tokens, width, rows, eps,
    ROWS: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, CHUNKS: tl.constexpr,
    EACH: tl.constexpr,
):  # fmt: skip
    """norm · projᵀ [BN, BT] FP32 of a program's BN rows; each program makes the norm, one stores it, rounded."""
    DTYPE: tl.constexpr = h.dtype.element_ty
    NORMED: tl.constexpr = normed.dtype.element_ty
    # All are [BN, BT, BC], of which a weight or a token has one: alike in registers, so that nothing moves.
    n = (tl.program_id(0) * BN + tl.arange(0, BN))[:, None, None]
    t = tl.arange(0, BT)[None, :, None]
    c = columns(BC, EACH)
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
            at = delta + t * delta_stride + i * BC + c
            part = tl.load(at, mask=inside, other=0.0).to(tl.float32)
            for r in tl.static_range(1, ROWS):
                part += tl.load(at + r * width, mask=inside, other=0.0).to(tl.float32)
            d = d + (part.to(DTYPE),)  # noqa: RUF005
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
        y = quotient * scale[i].to(tl.float32)
        acc += w[i].to(tl.float32) * y
        if tl.program_id(0) == 0:
            to = t * width + i * BC + c
            inside = (i * BC + c < width) & (t < tokens)
            if delta is not None:
                tl.store(total + to, x[i], mask=inside)
            tl.store(normed + to, y.to(NORMED), mask=inside)
    return tl.sum(acc, 2)


def sum_and_norm(h_TC: Tensor, delta_TC: Tensor | Parts | None, dtype: torch.dtype) -> tuple[Tensor | None, Tensor]:
    """Where a norm's kernel writes h + delta, if there is a delta, and its norm in `dtype`."""
    total, normed = (torch.empty(h_TC.shape, dtype=kind, device=h_TC.device) for kind in (h_TC.dtype, dtype))
    return None if delta_TC is None else total, normed
