"""Absorbed attention to paged latents in three launches.

    absorb   each head's query through its W_UK: [B, H, L], what is compared with latents themselves
    attend   one program for each part of a sequence: all heads share its latents, which are read once; a part leaves
             its softmax-weighted mean latent, in 16 bits, and the logarithm of its weight
    finish   the mean over the parts, in their order, through each head's W_UV

A sequence's length is cut into equal parts by the programs themselves, as many as the grid has or as there are tiles;
the rest leaves at once. So one graph serves all lengths, and a short context has few parts to add up.

Latents are the left operand of both products and the heads, padded to 8, the minor side: scores [T, H], means
[RANK, H]. 8-bit codes are operands as they are, the even latents before the odd ones (`words`), and a token's scale
multiplies its scores and weights; queries and means lie even ‖ odd likewise.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from klquant.kernels.mla.ends import absorb_kernel, finish_kernel
from klquant.kernels.mla.pages import PAGE_SIZE, LatentPages
from klquant.kernels.mla.tiles import Tile
from klquant.kernels.mla.words import latents, unit
from klquant.kernels.ptx import PTX

LOG2E = 1.4426950408889634


@triton.jit
def _part(length, splits, TOKENS: tl.constexpr):
    """(tiles of a sequence, tiles of each of its parts)."""
    tiles = tl.cdiv(length, TOKENS)
    return tiles, tl.cdiv(tiles, splits)


@triton.jit
def _rows(page, tile, t, length, PAGE: tl.constexpr, TOKENS: tl.constexpr):
    """(index in the pages [T], whether it is one of the sequence's) of the tokens of a tile on `page`."""
    return page.to(tl.int64) * PAGE + tile % (PAGE // TOKENS) * TOKENS + t, tile * TOKENS + t < length


@triton.jit
def _words(data, row, seen, first, COUNT: tl.constexpr, STRIDE: tl.constexpr):
    """COUNT words [T, COUNT] of each token. What is not seen meets weights of 0, and must not be NaN."""
    i = first + tl.arange(0, COUNT)
    return tl.load(data + row[:, None] * STRIDE + i[None, :], mask=seen[:, None], other=0)


@triton.jit
def attend_kernel(
    q, data, scale, page_table, table_stride, length, mean, weight, splits, factor,
    H: tl.constexpr, BH: tl.constexpr, RANK: tl.constexpr, ROPE: tl.constexpr, PAGE: tl.constexpr,
    FORMAT: tl.constexpr, TOKENS: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """mean [B, splits, H, RANK] of the parts that exist; weight [B, H, splits], base 2, FP32, −∞ of others; grid
    (splits, B).

    data: words of FIELDS latents. factor: the scores' scale · log2 e.
    """
    DTYPE: tl.constexpr = q.dtype.element_ty
    FIELDS: tl.constexpr = 1 if FORMAT == "plain" else 2
    HALF: tl.constexpr = RANK // FIELDS
    TAIL: tl.constexpr = ROPE // FIELDS
    UNIT: tl.constexpr = unit(FORMAT, DTYPE)
    # Keeps a weight times the scale of INT8 codes clear of FP16's small numbers.
    GAIN: tl.constexpr = 128.0 if FORMAT == "int8" else 1.0
    split = tl.program_id(0)
    b = tl.program_id(1)
    n = tl.load(length + b)
    tiles, per = _part(n, splits, TOKENS)
    first = split * per
    last = tl.minimum(first + per, tiles)
    h1 = tl.arange(0, BH)
    weight_at = weight + (b * H + h1) * splits + split
    if first < last:
        end = tl.minimum(n, last * TOKENS)
        t = tl.arange(0, TOKENS)
        h = tl.arange(0, BH)[None, :]
        acc = tl.zeros([RANK, BH], tl.float32)
        top = tl.full([BH], float("-inf"), tl.float32)
        # Each thread adds up its own weights; they meet after the last tile.
        weights = tl.zeros([TOKENS, BH], tl.float32)
        pages = page_table + b * table_stride
        page = tl.load(pages + first // (PAGE // TOKENS))
        row, seen = _rows(page, first, t, end, PAGE, TOKENS)
        latent = latents(_words(data, row, seen, 0, HALF, HALF + TAIL), FORMAT, DTYPE, PTX)
        rope = latents(_words(data, row, seen, HALF, TAIL, HALF + TAIL), FORMAT, DTYPE, PTX)
        if FORMAT != "plain":
            step = tl.load(scale + row, mask=seen, other=0.0) * UNIT
        page = tl.load(pages + tl.minimum(first + 1, last - 1) // (PAGE // TOKENS))
        q_at = q + (b.to(tl.int64) * H + h) * (RANK + ROPE)
        q_latent = tl.load(q_at + tl.arange(0, RANK)[:, None], mask=h < H, other=0.0)
        q_rope = tl.load(q_at + RANK + tl.arange(0, ROPE)[:, None], mask=h < H, other=0.0)
        for tile in tl.range(first, last, num_stages=1):
            # The next tile's words are on their way to registers while this one's latents are multiplied, its page was
            # looked up a tile before. Latents that come from the turn before go to shared memory once, for both
            # products; Triton would unpack those of this turn for each anew.
            row, next_seen = _rows(page, tile + 1, t, end, PAGE, TOKENS)
            words = _words(data, row, next_seen, 0, HALF, HALF + TAIL)
            tail = _words(data, row, next_seen, HALF, TAIL, HALF + TAIL)
            if FORMAT != "plain":
                next_step = tl.load(scale + row, mask=next_seen, other=0.0) * UNIT
            page = tl.load(pages + tl.minimum(tile + 2, last - 1) // (PAGE // TOKENS))

            scores = tl.dot(latent, q_latent)
            scores = tl.dot(rope, q_rope, scores)
            if FORMAT != "plain":
                scores *= step[:, None]
            scores = tl.where(seen[:, None], scores * factor, float("-inf"))
            higher = tl.maximum(top, tl.max(scores, 0))
            p = tl.exp2(scores - higher[None, :])
            fade = tl.exp2(top - higher)
            weights = weights * fade[None, :] + p
            top = higher
            if FORMAT != "plain":
                p *= step[:, None] * GAIN
                step = next_step
            acc = tl.dot(tl.trans(latent), p.to(DTYPE), acc * fade[None, :])

            latent = latents(words, FORMAT, DTYPE, PTX)
            rope = latents(tail, FORMAT, DTYPE, PTX)
            seen = next_seen
        total = tl.sum(weights, 0)
        mean_at = mean + ((b.to(tl.int64) * splits + split) * H + h) * RANK
        tl.store(mean_at + tl.arange(0, RANK)[:, None], (acc * (1.0 / (total * GAIN))[None, :]).to(DTYPE), mask=h < H)
        tl.store(weight_at, top + tl.log2(total), mask=h1 < H)
    else:
        tl.store(weight_at, tl.full([BH], float("-inf"), tl.float32), mask=h1 < H)


def mla_decode(
    q_BHK: Tensor, kv_b: Tensor, pages: LatentPages, page_table_BM: Tensor, length_B: Tensor, scale: float, tile: Tile
) -> Tensor:
    """Three launches."""
    batch, heads, qk = q_BHK.shape
    rank = kv_b.shape[1]
    rope = pages.data.shape[-1] - rank
    nope, v = qk - rope, kv_b.shape[0] // heads - (qk - rope)
    dtype, device = q_BHK.dtype, q_BHK.device
    coded = pages.scale is not None
    sizes = {"H": heads, "RANK": rank, "FIELDS": 2 if coded else 1, "EARLY": tile.early}
    early = {"launch_pdl": True} if tile.early else {}
    q = torch.empty(batch, heads, rank + rope, dtype=dtype, device=device)
    columns, block = 8 if batch <= 8 else 16, min(128, rank)
    absorb_kernel[(heads, rank // block, triton.cdiv(batch, columns))](
        q_BHK, q_BHK.stride(0), q_BHK.stride(1), kv_b, q, batch, NOPE=nope, ROPE=rope, V=v, BL=block, BM=columns,
        num_warps=4, **sizes, **early,
    )  # fmt: skip
    mean = torch.empty(batch, tile.splits, heads, rank, dtype=dtype, device=device)
    weight = torch.empty(batch, heads, tile.splits, dtype=torch.float32, device=device)
    parts = length_B, mean, weight, tile.splits, scale * LOG2E
    data = pages.data.view(torch.int16) if coded else pages.data
    table = page_table_BM, page_table_BM.stride(0)
    padded = triton.next_power_of_2(heads)
    if tile.staged:
        from klquant.kernels.mla import hopper

        hopper.attend_kernel[(tile.splits, batch)](
            q, data, pages.scale, *table, *parts, H=heads, BH=max(32, padded), RANK=rank, ROPE=rope, PAGE=PAGE_SIZE,
            FORMAT=pages.format, EARLY=tile.early, num_warps=tile.warps, **early,
        )  # fmt: skip
    else:
        attend_kernel[(tile.splits, batch)](
            q, data, pages.scale, *table, *parts, H=heads, BH=max(8, padded), RANK=rank, ROPE=rope, PAGE=PAGE_SIZE,
            FORMAT=pages.format, TOKENS=tile.tokens, PTX=PTX, num_warps=tile.warps,
        )  # fmt: skip
    out = torch.empty(batch, heads * v, dtype=dtype, device=device)
    block, groups = min(32 if batch <= 16 else 64, v), max(1, 8 // triton.next_power_of_2(batch))
    finish_kernel[(heads, v // block, triton.cdiv(batch, columns // groups))](
        mean, weight, kv_b, out, batch, tile.splits, NOPE=nope, V=v, SPLITS=triton.next_power_of_2(tile.splits),
        AT_ONCE=64 // columns, BV=block, ROWS=columns, GROUPS=groups, num_warps=8, **sizes, **early,
    )  # fmt: skip
    return out
