"""y = x Wᵀ with W packed, and silu(x Gᵀ) · (x Uᵀ) with rows of G and U interleaved sixteen by sixteen."""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from klquant.kernels.bricks import ROWS, tile_product
from klquant.kernels.linear.layout import Packed
from klquant.kernels.linear.tiles import Tile

# Triton's interpreter knows no inline assembly.
PTX = os.environ.get("TRITON_INTERPRET") != "1"


@triton.jit
def gated(acc):
    """acc [BN, BM] of interleaved gate and up rows → silu(gate) · up [BN/2, BM]."""
    BN: tl.constexpr = acc.shape[0]
    BM: tl.constexpr = acc.shape[1]
    pairs = tl.permute(tl.reshape(acc, [BN // (2 * ROWS), 2, ROWS, BM]), (0, 2, 3, 1))
    gate, up = tl.split(pairs)
    return tl.reshape(gate * tl.sigmoid(gate) * up, [BN // 2, BM])


@triton.jit
def linear_kernel(
    x, x_stride, words, high, scale, zero, y, y_stride, tokens, rows, bricks, groups,
    BITS: tl.constexpr, GROUP: tl.constexpr, GATED: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
    SPLIT: tl.constexpr, STAGES: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """y [tokens, rows]; grid (tiles of rows, tiles of tokens)."""
    tile = tl.program_id(0)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    exists = m < tokens
    acc = tile_product(
        x + m.to(tl.int64) * x_stride, exists, words, high, scale, zero, tile * BN, bricks, groups,
        BITS, GROUP, BN, BM, SPLIT, STAGES, PTX,
    )  # fmt: skip
    if GATED:
        acc = gated(acc)
    n = tile * acc.shape[0] + tl.arange(0, acc.shape[0])
    at = m.to(tl.int64)[None, :] * y_stride + n[:, None]
    tl.store(y + at, acc.to(y.dtype.element_ty), mask=exists[None, :] & (n < rows)[:, None])


def linear(x_MK: Tensor, w: Packed, tile: Tile, *, gated: bool = False, out: Tensor | None = None) -> Tensor:
    """x [M, K padded to whole bricks] → y [M, N], or [M, N/2] when `gated`. Rows of x and y may be strided."""
    m, rows = x_MK.shape[0], w.n // 2 if gated else w.n
    y = torch.empty(m, rows, dtype=x_MK.dtype, device=x_MK.device) if out is None else out
    grid = (w.row_bricks * 16 // tile.rows, triton.cdiv(m, tile.tokens))
    linear_kernel[grid](
        x_MK, x_MK.stride(0), *w.tensors, y, y.stride(0), m, rows, w.bricks, w.groups,
        BITS=w.bits, GROUP=w.group, GATED=gated, PTX=PTX, **tile.options,
    )  # fmt: skip
    return y
