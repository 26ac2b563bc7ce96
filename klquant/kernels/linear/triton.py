"""y = x Wᵀ with W packed, and silu(x Gᵀ) · (x Uᵀ) with rows of G and U interleaved sixteen by sixteen."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from klquant.kernels.bricks import BRICK, CHUNK, ROWS, Weight, fields, tile_product, unpack
from klquant.kernels.linear.layout import Packed
from klquant.kernels.linear.tiles import Tile
from klquant.kernels.norm.parts import Parts
from klquant.kernels.ptx import PTX

# Inputs of a plain weight that a program reads at once: of two bytes each, what a brick of bytes has.
PLAIN_INPUTS = tl.constexpr(64)


@triton.jit
def gated(acc):
    """acc [BN, BM] of interleaved gate and up rows → silu(gate) · up [BN/2, BM]."""
    BN: tl.constexpr = acc.shape[0]
    BM: tl.constexpr = acc.shape[1]
    pairs = tl.permute(tl.reshape(acc, [BN // (2 * ROWS), 2, ROWS, BM]), (0, 2, 3, 1))
    gate, up = tl.split(pairs)
    return tl.reshape(gate * tl.sigmoid(gate) * up, [BN // 2, BM])


@triton.jit
def plain_tile(
    x, tokens, m, w, first_row, y, rows, width,
    BN: tl.constexpr, BM: tl.constexpr, STAGES: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """y [m, rows] of a plain weight [rows, width]: rows first_row …, x and tokens as in `tile_product`."""
    n = (first_row + tl.arange(0, BN))[:, None]
    j = tl.arange(0, PLAIN_INPUTS)
    acc = tl.zeros([BN, BM], tl.float32)
    for start in tl.range(0, width, PLAIN_INPUTS, num_stages=STAGES):
        k = start + j
        a = tl.load(w + n * width + k[None, :], mask=(n < rows) & (k < width)[None, :], other=0.0)
        b = tl.load(x[None, :] + k[:, None], mask=tokens[None, :] & (k < width)[:, None], other=0.0)
        acc = tl.dot(a, b, acc) if PTX else tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    at = m.to(tl.int64)[None, :] * rows + n
    tl.store(y + at, acc.to(y.dtype.element_ty), mask=tokens[None, :] & (n < rows))


# Whether their number is a multiple of 16 helps nothing here, and would be one more kernel to build.
@triton.jit(do_not_specialize_on_alignment=["tokens"])
def linear_kernel(
    x, x_stride, words, high, scale, zero, y, y_stride, part_stride, tokens, rows, bricks, groups,
    beside, beside_y, beside_rows, beside_width, beside_tiles,
    BITS: tl.constexpr, GROUP: tl.constexpr, GATED: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
    SPLIT: tl.constexpr, SCALED: tl.constexpr, STAGES: tl.constexpr, PTX: tl.constexpr, BESIDE_BN: tl.constexpr,
):  # fmt: skip
    """y [tokens, rows], and beside_y [tokens, beside_rows] if there is another weight.

    Grid (tiles, tiles of tokens, parts): the first `beside_tiles` are the other weight's; each part has some of the
    bricks along K, and its own y.
    """
    tile = tl.program_id(0) - beside_tiles
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    exists = m < tokens
    if BESIDE_BN > 0 and tile < 0:
        plain_tile(
            x + m.to(tl.int64) * x_stride, exists, m, beside, tl.program_id(0) * BESIDE_BN, beside_y, beside_rows,
            beside_width, BESIDE_BN, BM, STAGES, PTX,
        )  # fmt: skip
    else:
        part = tl.program_id(2)
        each = tl.cdiv(bricks, tl.num_programs(2))
        acc = tile_product(
            x + m.to(tl.int64) * x_stride, exists, Weight(words, high, scale, zero, bricks, groups), tile * BN,
            part * each, tl.minimum(part * each + each, bricks),
            BITS, GROUP, BN, BM, SPLIT, SCALED, STAGES, PTX,
        )  # fmt: skip
        if GATED:
            acc = gated(acc)
        n = tile * acc.shape[0] + tl.arange(0, acc.shape[0])
        at = part * part_stride + m.to(tl.int64)[None, :] * y_stride + n[:, None]
        tl.store(y + at, acc.to(y.dtype.element_ty), mask=exists[None, :] & (n < rows)[:, None])


def linear(x_MK: Tensor, w: Packed, tile: Tile, *, gated: bool = False, out: Tensor | None = None) -> Tensor:
    """x [M, K padded to whole bricks] → y [M, N], or [M, N/2] when `gated`. Rows of x and y may be strided."""
    m, rows = x_MK.shape[0], w.n // 2 if gated else w.n
    y = torch.empty(m, rows, dtype=x_MK.dtype, device=x_MK.device) if out is None else out
    grid = (w.row_bricks * 16 // tile.rows, triton.cdiv(m, tile.tokens))
    linear_kernel[grid](
        x_MK, x_MK.stride(0), *w.tensors, y, y.stride(0), 0, m, rows, w.bricks, w.groups, None, None, 0, 0, 0,
        BITS=w.bits, GROUP=w.group, GATED=gated, SCALED=tile.scaled, PTX=PTX, BESIDE_BN=0,
        **tile.options,
    )  # fmt: skip
    return y


def linear_in_parts(x_MK: Tensor, w: Packed, tile: Tile, parts: int) -> Parts:
    """x [M, K padded to whole bricks] → the products of `parts` pieces of K, FP32."""
    y = torch.empty(x_MK.shape[0], parts, w.n, dtype=torch.float32, device=x_MK.device)
    grid = (w.row_bricks * 16 // tile.rows, triton.cdiv(x_MK.shape[0], tile.tokens), parts)
    linear_kernel[grid](
        x_MK, x_MK.stride(0), *w.tensors, y, y.stride(0), y.stride(1), x_MK.shape[0], w.n, w.bricks, w.groups,
        None, None, 0, 0, 0, BITS=w.bits, GROUP=w.group, GATED=False, SCALED=tile.scaled, PTX=PTX,
        BESIDE_BN=0, **tile.options,
    )  # fmt: skip
    return Parts(y)


def linear_beside(x_MK: Tensor, w: Packed, tile: Tile, plain_NK: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K padded to whole bricks] → its products with w and with a small contiguous weight in x's dtype."""
    m, (rows, width) = x_MK.shape[0], plain_NK.shape
    y, beside_y = (torch.empty(m, n, dtype=x_MK.dtype, device=x_MK.device) for n in (w.n, rows))
    # Half as many rows as another program and twice as many bytes a weight: none is done later than the others.
    beside_rows = max(16, tile.rows // 2)
    tiles = triton.cdiv(rows, beside_rows)
    grid = (tiles + w.row_bricks * 16 // tile.rows, triton.cdiv(m, tile.tokens))
    linear_kernel[grid](
        x_MK, x_MK.stride(0), *w.tensors, y, y.stride(0), 0, m, w.n, w.bricks, w.groups, plain_NK, beside_y, rows,
        width, tiles, BITS=w.bits, GROUP=w.group, GATED=False, SCALED=tile.scaled, PTX=PTX,
        BESIDE_BN=beside_rows, **tile.options,
    )  # fmt: skip
    return y, beside_y


@triton.jit
def unpack_kernel(
    words, high, scale, zero, y, y_stride, bricks, groups, up_rows,
    BITS: tl.constexpr, GROUP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """y [rows, K padded] = (code − zero) · scale; grid (tiles of rows, bricks).

    With `up_rows` the rows are gate's and up's, sixteen by sixteen in turn: gate's go first, up's to `up_rows` and on.
    """
    FIELDS: tl.constexpr = fields(BITS)
    brick = tl.program_id(1)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    j = tl.arange(0, CHUNK)
    at = ((n // ROWS) * bricks * BRICK + (n % ROWS) * CHUNK)[:, None] + j[None, :] + brick * BRICK
    target = n
    if up_rows > 0:
        target = n // (2 * ROWS) * ROWS + n % ROWS + tl.where(n // ROWS % 2 == 1, up_rows, 0)
    w = tl.load(words + at)
    hi = tl.load(high + at).to(tl.int16) if BITS == 3 else None
    for field in tl.static_range(FIELDS):
        k = (brick * FIELDS + field) * CHUNK
        group = (k // GROUP if GROUP > 0 else 0) * ROWS + (n // ROWS) * groups * ROWS + n % ROWS
        value = unpack(w, hi, field, BITS, tl.float32, False)
        if zero is not None:
            value -= tl.load(zero + group).to(tl.float32)[:, None]
        value *= tl.load(scale + group).to(tl.float32)[:, None]
        tl.store(y + target.to(tl.int64)[:, None] * y_stride + k + j[None, :], value.to(y.dtype.element_ty))


def unpacked(w: Packed, dtype: torch.dtype, gated: bool = False) -> Tensor:
    """Values of quantized w [N, K padded] in `dtype`, rounded to it. `gated`: gate's rows, then up's, N/2 each."""
    rows = w.row_bricks * 16
    y = torch.empty(rows, w.k_padded, dtype=dtype, device=w.words.device)
    unpack_kernel[(rows // 64, w.bricks)](
        *w.tensors, y, y.stride(0), w.bricks, w.groups, rows // 2 if gated else 0,
        BITS=w.bits, GROUP=w.group, BN=64, num_warps=4,
    )  # fmt: skip
    return y[: w.n]


@triton.jit
def silu_mul_kernel(x, y, width, BLOCK: tl.constexpr):
    """y [M, width] = silu of the first half of x's rows · the second half; grid (M, blocks of width)."""
    m = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = n < width
    gate = tl.load(x + m * 2 * width + n, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + m * 2 * width + width + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + m * width + n, (gate * tl.sigmoid(gate) * up).to(y.dtype.element_ty), mask=inside)


def silu_mul(x_MN: Tensor) -> Tensor:
    """silu(gate) · up: gate and up [M, N/2] beside each other → [M, N/2]."""
    m, n = x_MN.shape
    y = torch.empty(m, n // 2, dtype=x_MN.dtype, device=x_MN.device)
    silu_mul_kernel[(m, triton.cdiv(n // 2, 1024))](x_MN, y, n // 2, BLOCK=1024, num_warps=4)
    return y
