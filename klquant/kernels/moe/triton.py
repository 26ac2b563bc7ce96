"""Routed experts and the shared one.

Few tokens: two launches, nothing sorted. `route_gate_up_kernel` has a program for each (route, tile) and for each tile
of the shared expert; `route_down_kernel` one for each (token, tile), which walks over that token's experts and the
shared one, so the sum over routes happens in registers in a fixed order.
Many tokens: routes sorted by expert (`grouping`), tiles of routes that share an expert, a weighted row for each route,
and `combine_kernel` adds a token's rows and the shared expert's in a fixed order.
Shapes: h [T·R, I], in order of route or sorted by expert; shared h [T, I].
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from klquant.kernels.bricks import BRICK, CHUNK, ROWS, accumulate, fields, tile_product
from klquant.kernels.linear.layout import Packed
from klquant.kernels.linear.tiles import Tile
from klquant.kernels.linear.triton import PTX, gated
from klquant.kernels.moe.grouping import group


@triton.jit
def route_gate_up_kernel(
    x, x_stride, expert, words, high, scale, zero, bricks, groups, words_stride, scale_stride, h, inner,
    shared_words, shared_high, shared_scale, shared_zero, shared_bricks, shared_groups, shared_h, shared_inner,
    shared_tiles, tokens, top,
    BITS: tl.constexpr, GROUP: tl.constexpr, SHARED_BITS: tl.constexpr, SHARED_GROUP: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """silu(gate) · up of every route and of the shared expert; grid: shared_tiles, then tiles × routes."""
    program = tl.program_id(0)
    m = tl.arange(0, BM)
    n = tl.arange(0, BN // 2)
    if program < shared_tiles:
        if SHARED_BITS > 0:
            acc = tile_product(
                x + m * x_stride, m < tokens, shared_words, shared_high, shared_scale, shared_zero, program * BN,
                shared_bricks, shared_groups, SHARED_BITS, SHARED_GROUP, BN, BM, SPLIT, STAGES, PTX,
            )  # fmt: skip
            at = m[None, :] * shared_inner + (program * (BN // 2) + n)[:, None]
            tl.store(shared_h + at, gated(acc).to(h.dtype.element_ty), mask=(m < tokens)[None, :])
    else:
        tiles = inner // (BN // 2)
        route = (program - shared_tiles) // tiles
        tile = (program - shared_tiles) % tiles
        # Where the expert begins. No function returns these pointers: before Triton 3.7 none can return None.
        e = tl.load(expert + route).to(tl.int64)
        w, s = e * words_stride, e * scale_stride
        acc = tile_product(
            x + (route // top) * x_stride + tl.zeros([BM], tl.int32), m < 1, words + w,
            high + w if high is not None else None, scale + s if scale is not None else None,
            zero + s if zero is not None else None, tile * BN, bricks,
            groups, BITS, GROUP, BN, BM, SPLIT, STAGES, PTX,
        )  # fmt: skip
        at = route * inner + tile * (BN // 2) + n[:, None] + m[None, :]
        tl.store(h + at, gated(acc).to(h.dtype.element_ty), mask=(m < 1)[None, :])


@triton.jit
def _down(
    parts, h, h_stride, expert, weight, items, words, high, scale, zero, n, groups, words_stride, scale_stride,
    BITS: tl.constexpr, GROUP: tl.constexpr, BRICKS: tl.constexpr, BM: tl.constexpr, SPLIT: tl.constexpr,
    STAGES: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """parts [SPLIT, BN, BM] plus Σ over `items` rows of h of weight · (W_expert h).

    Without `expert` there is one, of weight 1. The bricks of all rows are one list, dealt out to the warps in turn;
    BRICKS of a row is a constant because every warp divides by it.
    """
    row = (n // ROWS) * (BRICKS * BRICK) + (n % ROWS) * CHUNK
    group_row = (n // ROWS) * groups * ROWS + n % ROWS
    INPUTS: tl.constexpr = CHUNK * fields(BITS)
    s = tl.arange(0, SPLIT)
    j = tl.arange(0, CHUNK)
    # One token: column 0 of BM.
    m = tl.arange(0, BM)[None, None, :]
    for first in tl.range(0, items * BRICKS, SPLIT, num_stages=STAGES):
        lives = first + s < items * BRICKS
        item = tl.minimum(first + s, items * BRICKS - 1) // BRICKS
        brick = tl.minimum(first + s, items * BRICKS - 1) % BRICKS
        if expert is not None:
            e = tl.load(expert + item).to(tl.int64)
            factor = tl.load(weight + item)[:, None]
        else:
            e = item.to(tl.int64) * 0
            factor = None
        words_at = (e * words_stride + brick * BRICK)[:, None, None] + row[None, :, None] + j[None, None, :]
        scale_at = (e * scale_stride)[:, None] + group_row[None, :]
        x = h + (item * h_stride + brick * INPUTS)[:, None, None] + j[None, :, None] + m * 0
        parts = accumulate(
            parts, x, (m < 1) & lives[:, None, None], words + words_at,
            high + words_at if BITS == 3 else None, lives[:, None, None], scale + scale_at if BITS < 16 else None,
            zero + scale_at if zero is not None else None, brick[:, None], factor, BITS, GROUP, PTX,
        )  # fmt: skip
    return parts


@triton.jit
def route_down_kernel(
    h, inner, expert, weight, words, high, scale, zero, groups, words_stride, scale_stride,
    shared_words, shared_high, shared_scale, shared_zero, shared_groups, shared_h, shared_inner, y, rows, top,
    BITS: tl.constexpr, GROUP: tl.constexpr, BRICKS: tl.constexpr,
    SHARED_BITS: tl.constexpr, SHARED_GROUP: tl.constexpr, SHARED_BRICKS: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """y [T, rows]; grid (tiles of rows, tokens)."""
    token = tl.program_id(1)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.arange(0, BM)
    parts = tl.zeros([SPLIT, BN, BM], tl.float32)
    parts = _down(
        parts, h + token * top * inner, inner, expert + token * top, weight + token * top, top, words, high, scale,
        zero, n, groups, words_stride, scale_stride, BITS, GROUP, BRICKS, BM, SPLIT, STAGES, PTX,
    )  # fmt: skip
    if SHARED_BITS > 0:
        parts = _down(
            parts, shared_h + token * shared_inner, shared_inner, None, None, 1, shared_words, shared_high,
            shared_scale, shared_zero, n, shared_groups, 0, 0,
            SHARED_BITS, SHARED_GROUP, SHARED_BRICKS, BM, SPLIT, STAGES, PTX,
        )  # fmt: skip
    acc = tl.sum(parts, 0)
    store = (m < 1)[None, :] & (n < rows)[:, None]
    tl.store(y + token * rows + n[:, None] + m[None, :], acc.to(y.dtype.element_ty), mask=store)


@triton.jit
def grouped_kernel(
    x, x_stride, order, tiles, weight, words, high, scale, zero, bricks, groups, words_stride, scale_stride, y, rows,
    top,
    BITS: tl.constexpr, GROUP: tl.constexpr, GATED: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
    SPLIT: tl.constexpr, STAGES: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """GATED: x by token → y = silu(gate) · up by sorted route. Else: x by sorted route → y = weight · down by route.

    Grid (tiles of rows, tiles of routes).
    """
    tile = tl.program_id(1)
    e = tl.load(tiles + tile * 3)
    if e >= 0:
        m = tl.load(tiles + tile * 3 + 1) + tl.arange(0, BM)
        exists = m < tl.load(tiles + tile * 3 + 2)
        source = tl.load(order + m, mask=exists, other=0) // top if GATED else m
        w, s = e.to(tl.int64) * words_stride, e.to(tl.int64) * scale_stride
        acc = tile_product(
            x + source.to(tl.int64) * x_stride, exists, words + w, high + w if high is not None else None,
            scale + s if scale is not None else None, zero + s if zero is not None else None,
            tl.program_id(0) * BN, bricks, groups,
            BITS, GROUP, BN, BM, SPLIT, STAGES, PTX,
        )  # fmt: skip
        if GATED:
            acc = gated(acc)
            target = m
        else:
            target = tl.load(order + m, mask=exists, other=0)
            acc = acc * tl.load(weight + target, mask=exists, other=0.0)[None, :]
        n = tl.program_id(0) * acc.shape[0] + tl.arange(0, acc.shape[0])
        at = target.to(tl.int64)[None, :] * rows + n[:, None]
        tl.store(y + at, acc.to(y.dtype.element_ty), mask=exists[None, :] & (n < rows)[:, None])


@triton.jit
def combine_kernel(routed, shared, y, rows, TOP: tl.constexpr, BLOCK: tl.constexpr):
    """y [T, rows] = Σ_r routed [T, R, rows] + shared [T, rows]; grid (tokens, blocks of rows)."""
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = n < rows
    acc = tl.zeros([BLOCK], tl.float32)
    for r in tl.static_range(TOP):
        acc += tl.load(routed + (token * TOP + r) * rows + n, mask=inside, other=0.0).to(tl.float32)
    if shared is not None:
        acc += tl.load(shared + token * rows + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + token * rows + n, acc.to(y.dtype.element_ty), mask=inside)


def _strides(w: Packed) -> tuple[int, int]:
    """Elements from one expert's words, and from one expert's scales, to the next one's."""
    return w.words.stride(0), 0 if w.scale is None else w.scale.stride(0)


def few_tokens(
    x_TC: Tensor, weight_TR: Tensor, expert_TR: Tensor, gate_up: Packed, down: Packed,
    shared_gate_up: Packed | None, shared_down: Packed | None, first: Tile, second: Tile,
) -> Tensor:  # fmt: skip
    """Routed experts plus the shared one, for at most `first.tokens` tokens: two launches."""
    tokens, top = expert_TR.shape
    device, dtype = x_TC.device, x_TC.dtype
    inner = gate_up.row_bricks * 16 // 2
    h = torch.empty(tokens * top, inner, device=device, dtype=dtype)
    shared_inner = 0 if shared_gate_up is None else shared_gate_up.row_bricks * 16 // 2
    shared_h = torch.empty(tokens, shared_inner, device=device, dtype=dtype)
    shared_tiles = shared_inner * 2 // first.rows
    route_gate_up_kernel[(shared_tiles + inner * 2 // first.rows * tokens * top,)](
        x_TC, x_TC.stride(0), expert_TR, *gate_up.tensors, gate_up.bricks, gate_up.groups, *_strides(gate_up), h, inner,
        *_shared(shared_gate_up), shared_h, shared_inner, shared_tiles, tokens, top,
        BITS=gate_up.bits, GROUP=gate_up.group, **_shared_format(shared_gate_up), PTX=PTX, **first.options,
    )  # fmt: skip
    y = torch.empty(tokens, down.n, device=device, dtype=dtype)
    shared = _shared(shared_down)
    route_down_kernel[(down.row_bricks * 16 // second.rows, tokens)](
        h, inner, expert_TR, weight_TR, *down.tensors, down.groups, *_strides(down),
        *shared[:4], shared[5], shared_h, shared_inner, y, down.n, top,
        BITS=down.bits, GROUP=down.group, BRICKS=down.bricks, SHARED_BRICKS=shared[4],
        **_shared_format(shared_down), PTX=PTX, **second.options,
    )  # fmt: skip
    return y


def many_tokens(
    x_TC: Tensor, weight_TR: Tensor, expert_TR: Tensor, gate_up: Packed, down: Packed, shared_TC: Tensor | None,
    first: Tile, second: Tile,
) -> Tensor:  # fmt: skip
    """Routed experts plus `shared_TC`, what the shared expert made of x: four launches. Tiles alike in tokens."""
    tokens, top = expert_TR.shape
    device, dtype = x_TC.device, x_TC.dtype
    order, tiles = group(expert_TR, gate_up.experts, first.tokens)
    inner = gate_up.row_bricks * 16 // 2

    def run(x: Tensor, w: Packed, tile: Tile, gated: bool, rows: int) -> Tensor:
        y = torch.empty(tokens * top, rows, device=device, dtype=dtype)
        grouped_kernel[(w.row_bricks * 16 // tile.rows, len(tiles))](
            x, x.stride(0), order, tiles, weight_TR, *w.tensors, w.bricks, w.groups, *_strides(w), y, rows, top,
            BITS=w.bits, GROUP=w.group, GATED=gated, PTX=PTX, **tile.options,
        )  # fmt: skip
        return y

    routed = run(run(x_TC, gate_up, first, True, inner), down, second, False, down.n)
    y = torch.empty(tokens, down.n, device=device, dtype=dtype)
    combine_kernel[(tokens, triton.cdiv(down.n, 1024))](routed, shared_TC, y, down.n, TOP=top, BLOCK=1024)
    return y


def _shared(w: Packed | None) -> tuple:
    return (None, None, None, None, 0, 0) if w is None else (*w.tensors, w.bricks, w.groups)


def _shared_format(w: Packed | None) -> dict[str, int]:
    return {"SHARED_BITS": 0 if w is None else w.bits, "SHARED_GROUP": 0 if w is None else w.group}
