"""Bricks in Triton: words to exact codes, and a tile of outputs accumulated brick by brick.

A tile is BN rows of a weight times BM tokens, [BN, BM] FP32: the weight is the left operand, unpacked in registers.
  narrow (SPLIT > 1): few tokens. SPLIT warps each take every SPLIT-th brick of the same rows, [SPLIT, BN, BM], and are
    summed at the end: as much of the weight is in flight as a GEMV needs, and the order of the sum is fixed.
  wide (SPLIT = 1): the warps share the rows; on Hopper the product is `wgmma` with the weight in registers.
Codes enter the product as exact integers and the scale multiplies FP32 sums of a group: the only roundings are those of
the activations and of FP32. SCALED, for many tokens: a code is multiplied by its scale before the product, and rounded;
nothing but the product itself then touches the sums.
Tokens are the minor side, 8 at least: a product with one token costs 8, and is still fewer instructions a weight than
unpacking to FP32 for FMAs.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from klquant.kernels.ptx import AND_OR, ANDN_OR, block, twice

ROWS = tl.constexpr(16)
CHUNK = tl.constexpr(32)
BRICK = tl.constexpr(512)  # words


class Weight(NamedTuple):
    """Of a `layout.Packed`, what a kernel reads: pointers or None, and counts along K."""

    words: tl.tensor
    high: tl.tensor | None
    scale: tl.tensor | None
    zero: tl.tensor | None
    bricks: tl.tensor
    groups: tl.tensor


@triton.constexpr_function
def fields(bits):
    """Codes a word holds: klquant.kernels.linear.layout.FIELDS."""
    return {3: 8, 4: 4, 8: 2, 16: 1}[bits]


@triton.constexpr_function
def unpack_asm(bits, field, bf16):
    """PTX from two words ($1; $2: their high bytes, widened) to two codes ($0), exact in BF16 or FP16.

    A 16-bit float of magnitude 2^m, m the mantissa's length, has the integers in its low bits: `or` the code in,
    subtract 2^m and the code's offset. BF16 has seven such bits, so of a byte code + 128 the low seven go there, and
    what is subtracted is 128 where the top bit is set and 256 where it is not: one exponent bit apart.
    """
    magic, one = (0x4300, 0x3F80) if bf16 else (0x6400, 0x3C00)
    width = 16 // {3: 8, 4: 4, 8: 2}[bits]
    lines = [f"shr.u32 a, $1, {width * field};" if field else "mov.b32 a, $1;"]
    if bits == 8 and bf16:
        lines += [
            f"lop3.b32 b, a, {twice(0x80)}, {twice(magic)}, {ANDN_OR};",
            f"lop3.b32 a, a, {twice(0x7F)}, {twice(magic)}, {AND_OR};",
            f"fma.rn.bf16x2 $0, b, {twice(0xBF80)}, a;",
        ]
    else:
        lines += [f"lop3.b32 a, a, {twice((1 << width) - 1)}, {twice(magic)}, {AND_OR};"]
        if bits == 3:
            shift = f"shl.b32 b, $2, {2 - field};" if field < 2 else f"shr.u32 b, $2, {field - 2};"
            lines += [shift, f"lop3.b32 a, b, {twice(4)}, a, {AND_OR};"]
        # 2^m + offset: the offset's bits, as an integer, on top of those of 2^m; negated by the sign bit.
        minus = 0x8000 | magic | (1 << (bits - 1))
        lines += [f"fma.rn.{'bf16x2' if bf16 else 'f16x2'} $0, a, {twice(one)}, {twice(minus)};"]
    return block(lines)


@triton.jit
def unpack(words, high, FIELD: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """Field FIELD of int16 `words` as exact codes; `high` is int16 (INT3's high bits) or None.

    In DTYPE, or without PTX in FP32: Triton's interpreter has neither inline assembly nor BF16 arithmetic.
    """
    if BITS == 16:
        value = words.to(tl.bfloat16, bitcast=True)
        return value.to(DTYPE) if PTX else value.to(tl.float32)
    elif PTX:
        asm: tl.constexpr = unpack_asm(BITS, FIELD, tl.bfloat16 == DTYPE)
        if BITS == 3:
            bits16 = tl.inline_asm_elementwise(asm, "=r,r,r", [words, high], dtype=tl.int16, is_pure=True, pack=2)
        else:
            bits16 = tl.inline_asm_elementwise(asm, "=r,r", [words], dtype=tl.int16, is_pure=True, pack=2)
        return bits16.to(DTYPE, bitcast=True)
    else:
        width: tl.constexpr = 16 // fields(BITS)
        code = (words >> (width * FIELD)) & ((1 << width) - 1)
        if BITS == 3:
            code = code | (((high >> FIELD) & 1) << width)
        return (code - (1 << (BITS - 1))).to(tl.float32)


@triton.jit
def _times(codes, scale, PTX: tl.constexpr):
    """codes · scale [BN, 1], two at a time, rounded to the codes' dtype."""
    if PTX:
        wide = tl.broadcast_to(scale.to(codes.dtype), codes.shape)
        # Before sm90 there is no product of two BF16 pairs, only a sum of it and something: −0.
        asm: tl.constexpr = (
            "{ .reg .b32 c; mov.b32 c, 0x80008000; fma.rn.bf16x2 $0, $1, $2, c; }" if codes.dtype == tl.bfloat16
            else "mul.rn.f16x2 $0, $1, $2;"
        )  # fmt: skip
        return tl.inline_asm_elementwise(asm, "=r,r,r", [codes, wide], dtype=codes.dtype, is_pure=True, pack=2)
    else:
        return codes * scale


@triton.jit
def _dot(codes, x, x_mask, acc, PTX: tl.constexpr):
    inputs = tl.load(x, mask=x_mask, other=0.0)
    return tl.dot(codes, inputs, acc) if PTX else tl.dot(codes, inputs.to(tl.float32), acc)


@triton.jit
def _load_scale(scale, at):
    """Scales in FP32. Of 16-bit ones two are read and one counts: Triton makes only loads of 32 bits asynchronous."""
    DTYPE: tl.constexpr = scale.dtype.element_ty
    if tl.float32 == DTYPE:
        return tl.load(scale + at)
    pair = tl.load(scale.to(tl.pointer_type(tl.int32), bitcast=True) + at // 2)
    if tl.bfloat16 == DTYPE:
        return tl.where(at % 2 == 0, pair << 16, pair & -65536).to(tl.float32, bitcast=True)
    return tl.where(at % 2 == 0, pair, pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def accumulate(
    acc, x, x_mask, words, high, mask, scale, zero, scale_at, brick,
    BITS: tl.constexpr, GROUP: tl.constexpr, SCALED: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """acc [.., BN, BM] plus one brick of inputs.

    x: pointers [.., 32, BM] to the first chunk; words, high: pointers [.., BN, 32] of the brick; mask [.., 1, 1] or
    None: whether it exists; scale, zero: a pointer each, or None; scale_at [.., BN]: where a row's first group lies
    behind them; brick: its index along K, a scalar or [.., 1].
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    FIELDS: tl.constexpr = fields(BITS)
    # What lies past the mask is whatever it is: it meets inputs that are 0.
    w = tl.load(words, mask=mask)
    hi = tl.load(high, mask=mask).to(tl.int16) if BITS == 3 else None
    if BITS == 16:
        acc = _dot(unpack(w, hi, 0, BITS, DTYPE, PTX), x, x_mask, acc, PTX)
    else:
        INPUTS: tl.constexpr = CHUNK * FIELDS
        # Parts of a brick that have their own scale, and the chunks of each.
        PARTS: tl.constexpr = INPUTS // GROUP if GROUP > 0 and GROUP < INPUTS else 1
        CHUNKS: tl.constexpr = FIELDS // PARTS
        for part in tl.static_range(PARTS):
            if GROUP == 0:
                group = brick * 0
            elif PARTS > 1:
                group = brick * PARTS + part
            else:
                group = brick // (GROUP // INPUTS)
            s = _load_scale(scale, scale_at + group * ROWS)
            total = acc if SCALED else tl.zeros_like(acc)
            for chunk in tl.static_range(CHUNKS):
                codes = unpack(w, hi, part * CHUNKS + chunk, BITS, DTYPE, PTX)
                if zero is not None:
                    codes = codes - tl.expand_dims(tl.load(zero + scale_at + group * ROWS).to(codes.dtype), -1)
                if SCALED:
                    codes = _times(codes, tl.expand_dims(s, -1), PTX)
                total = _dot(codes, x + (part * CHUNKS + chunk) * CHUNK, x_mask, total, PTX)
            acc = total if SCALED else acc + total * tl.expand_dims(s, -1)
    return acc


@triton.jit
def tile_product(
    x, tokens, w, first_row, start, stop,
    BITS: tl.constexpr, GROUP: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, SPLIT: tl.constexpr,
    SCALED: tl.constexpr, STAGES: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """[BN, BM] FP32: rows first_row … (a multiple of 16) of a weight times BM token rows, bricks start … stop − 1.

    x: pointers [BM] to the tokens' inputs; tokens [BM]: which of them exist.
    """
    if SPLIT == 1:
        INPUTS: tl.constexpr = CHUNK * fields(BITS)
        n = first_row + tl.arange(0, BN)
        row = (n // ROWS) * w.bricks * BRICK + (n % ROWS) * CHUNK
        group_row = (n // ROWS) * w.groups * ROWS + n % ROWS
        j = tl.arange(0, CHUNK)
        acc = tl.zeros([BN, BM], tl.float32)
        w_at = row[:, None] + j[None, :]
        x_at = x[None, :] + j[:, None]
        for brick in tl.range(start, stop, num_stages=STAGES):
            at = w_at + brick * BRICK
            acc = accumulate(
                acc, x_at + brick * INPUTS, tokens[None, :], w.words + at, w.high + at if BITS == 3 else None,
                None, w.scale, w.zero, group_row, brick, BITS, GROUP, SCALED, PTX,
            )  # fmt: skip
        return acc
    else:
        parts = tl.zeros([SPLIT, BN, BM], tl.float32)
        parts = split_product(parts, x, tokens, w, first_row, start, stop, BITS, GROUP, BN, SPLIT, STAGES, PTX)
        return tl.sum(parts, 0)


@triton.jit
def split_product(
    parts, x, tokens, w, first_row, start, stop,
    BITS: tl.constexpr, GROUP: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """parts [SPLIT, BN, BM] plus a tile's product as in `tile_product`, its bricks dealt out to the warps in turn."""
    INPUTS: tl.constexpr = CHUNK * fields(BITS)
    n = first_row + tl.arange(0, BN)
    row = (n // ROWS) * w.bricks * BRICK + (n % ROWS) * CHUNK
    group_row = (n // ROWS) * w.groups * ROWS + n % ROWS
    j = tl.arange(0, CHUNK)
    s = tl.arange(0, SPLIT)
    w_at = (row[:, None] + j[None, :])[None, :, :] + (s * BRICK)[:, None, None]
    x_at = (x[None, :] + j[:, None])[None, :, :] + (s * INPUTS)[:, None, None]
    for first in tl.range(start, stop, SPLIT, num_stages=STAGES):
        brick = first + s
        lives = brick < stop
        at = w_at + first * BRICK
        # A brick past the end reads the last one's scales: what they multiply is 0.
        inside = tl.minimum(brick, stop - 1)[:, None]
        parts = accumulate(
            parts, x_at + first * INPUTS, tokens[None, None, :] & lives[:, None, None], w.words + at,
            w.high + at if BITS == 3 else None, lives[:, None, None], w.scale, w.zero, group_row[None, :], inside,
            BITS, GROUP, False, PTX,
        )  # fmt: skip
    return parts
