"""Routed experts and the shared one.

Few tokens: two launches, nothing sorted. `route_gate_up_kernel` has a program for each (route, tile) and for each tile
of the shared expert; `route_down_kernel` has some for each (token, tile): each sums a part of that token's routes in
registers, in a fixed order, and the last has the shared expert. Their sum is left to the next norm.
Many tokens: routes sorted by expert (`grouping`), tiles of routes that share an expert, a weighted row for each route,
and `combine_kernel`, or the next norm, adds a token's rows and the shared expert's in a fixed order.
Shapes: h [T·R, I], in order of route or sorted by expert; shared h [T, I].
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from klquant.kernels.bricks import BRICK, CHUNK, ROWS, accumulate, fields, split_product, tile_product
from klquant.kernels.linear.layout import Packed
from klquant.kernels.linear.tiles import Tile
from klquant.kernels.linear.triton import PTX, gated
from klquant.kernels.moe.grouping import group
from klquant.kernels.norm.parts import WIDE_TOKENS, Parts

# Programs that share a token's routes in the second of the few-token kernels; the shared expert has its own.
ROUTE_PARTS = 2


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
                shared_bricks, shared_groups, 0, shared_bricks, SHARED_BITS, SHARED_GROUP, BN, BM, SPLIT, False, STAGES,
                PTX,
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
            groups, 0, bricks, BITS, GROUP, BN, BM, SPLIT, False, STAGES, PTX,
        )  # fmt: skip
        at = route * inner + tile * (BN // 2) + n[:, None] + m[None, :]
        tl.store(h + at, gated(acc).to(h.dtype.element_ty), mask=(m < 1)[None, :])


@triton.jit
def route_down_kernel(
    h, inner, expert, weight, words, high, scale, zero, bricks, groups, words_stride, scale_stride,
    shared_words, shared_high, shared_scale, shared_zero, shared_bricks, shared_groups, shared_h, shared_inner, y, rows,
    top, token_stride,
    BITS: tl.constexpr, GROUP: tl.constexpr, SHARED_BITS: tl.constexpr, SHARED_GROUP: tl.constexpr,
    PARTS: tl.constexpr, ROUTES: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, SPLIT: tl.constexpr,
    STAGES: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """y [T, parts, rows] FP32; grid (tiles of rows, tokens, parts): PARTS of ROUTES routes, then the shared expert.

    SPLIT // ROUTES warps share the bricks of each route.
    """
    token = tl.program_id(1)
    part = tl.program_id(2)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    # One token: column 0 of BM.
    m = tl.arange(0, BM)
    parts = tl.zeros([SPLIT, BN, BM], tl.float32)
    if part < PARTS:
        s = tl.arange(0, SPLIT)
        j = tl.arange(0, CHUNK)
        INPUTS: tl.constexpr = CHUNK * fields(BITS)
        AT_ONCE: tl.constexpr = SPLIT // ROUTES
        route = part * ROUTES + s % ROUTES
        exists = route < top
        e = tl.load(expert + token * top + route, mask=exists, other=0).to(tl.int64)
        factor = tl.load(weight + token * top + route, mask=exists, other=0.0)
        row = (n // ROWS) * bricks * BRICK + (n % ROWS) * CHUNK
        w_at = (e * words_stride)[:, None, None] + row[None, :, None] + j[None, None, :]
        scale_at = (e * scale_stride)[:, None] + ((n // ROWS) * groups * ROWS + n % ROWS)[None, :]
        x_at = h + ((token * top + route) * inner)[:, None, None] + j[None, :, None] + (m * 0)[None, None, :]
        for first in tl.range(0, bricks, AT_ONCE, num_stages=STAGES):
            brick = first + s // ROUTES
            lives = (exists & (brick < bricks))[:, None, None]
            inside = tl.minimum(brick, bricks - 1)
            at = w_at + (inside * BRICK)[:, None, None]
            parts = accumulate(
                parts, x_at + (inside * INPUTS)[:, None, None], (m < 1)[None, None, :] & lives, words + at,
                high + at if BITS == 3 else None, lives, scale, zero, scale_at, inside[:, None], BITS, GROUP, False,
                PTX,
            )  # fmt: skip
        parts *= factor[:, None, None]
    else:
        if SHARED_BITS > 0:
            parts = split_product(
                parts, shared_h + token * shared_inner + m * 0, m < 1, shared_words, shared_high, shared_scale,
                shared_zero, tl.program_id(0) * BN, shared_bricks, shared_groups, 0, shared_bricks,
                SHARED_BITS, SHARED_GROUP, BN, BM, SPLIT, STAGES, PTX,
            )  # fmt: skip
    acc = tl.sum(parts, 0)
    store = (m < 1)[None, :] & (n < rows)[:, None]
    tl.store(y + token * token_stride + part * rows + n[:, None] + m[None, :], acc, mask=store)


@triton.jit
def grouped_kernel(
    x, x_stride, order, tiles, weight, words, high, scale, zero, bricks, groups, words_stride, scale_stride, y, rows,
    top,
    shared_x, shared_x_stride, shared_words, shared_high, shared_scale, shared_zero, shared_bricks, shared_groups,
    shared_y, shared_rows, tokens, shared_tiles,
    BITS: tl.constexpr, GROUP: tl.constexpr, SHARED_BITS: tl.constexpr, SHARED_GROUP: tl.constexpr, GATED: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, SPLIT: tl.constexpr, SCALED: tl.constexpr, STAGES: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """GATED: x by token → y = silu(gate) · up by sorted route. Else: x by sorted route → y = weight · down by route.

    Grid (tiles of rows, `shared_tiles` tiles of tokens for the shared expert, then tiles of routes).
    """
    tile = tl.program_id(1) - shared_tiles
    first_row = tl.program_id(0) * BN
    OUT: tl.constexpr = BN // 2 if GATED else BN
    n = tl.program_id(0) * OUT + tl.arange(0, OUT)
    if tile < 0:
        if SHARED_BITS > 0 and tl.program_id(0) * OUT < shared_rows:
            m = tl.program_id(1) * BM + tl.arange(0, BM)
            exists = m < tokens
            acc = tile_product(
                shared_x + m.to(tl.int64) * shared_x_stride, exists, shared_words, shared_high, shared_scale,
                shared_zero, first_row, shared_bricks, shared_groups, 0, shared_bricks,
                SHARED_BITS, SHARED_GROUP, BN, BM, SPLIT, SCALED, STAGES, PTX,
            )  # fmt: skip
            if GATED:
                acc = gated(acc)
            at = m.to(tl.int64)[None, :] * shared_rows + n[:, None]
            inside = exists[None, :] & (n < shared_rows)[:, None]
            tl.store(shared_y + at, acc.to(y.dtype.element_ty), mask=inside)
    else:
        e = tl.load(tiles + tile * 3)
        if e >= 0 and tl.program_id(0) * OUT < rows:
            first, last = tl.load(tiles + tile * 3 + 1), tl.load(tiles + tile * 3 + 2)
            # An expert's last tile is half empty half of the time, or nearly empty.
            if BM >= 128 and last - first <= BM // 4:
                _routes(
                    x, x_stride, order, first, last, e, weight, words, high, scale, zero, bricks, groups, words_stride,
                    scale_stride, y, rows, top, BITS, GROUP, GATED, BN, BM // 4, SPLIT, SCALED,
                    STAGES, PTX,
                )  # fmt: skip
            elif BM >= 64 and last - first <= BM // 2:
                _routes(
                    x, x_stride, order, first, last, e, weight, words, high, scale, zero, bricks, groups, words_stride,
                    scale_stride, y, rows, top, BITS, GROUP, GATED, BN, BM // 2, SPLIT, SCALED,
                    STAGES, PTX,
                )  # fmt: skip
            else:
                _routes(
                    x, x_stride, order, first, last, e, weight, words, high, scale, zero, bricks, groups, words_stride,
                    scale_stride, y, rows, top, BITS, GROUP, GATED, BN, BM, SPLIT, SCALED,
                    STAGES, PTX,
                )  # fmt: skip


@triton.jit
def _routes(
    x, x_stride, order, first, last, e, weight, words, high, scale, zero, bricks, groups, words_stride, scale_stride, y,
    rows, top,
    BITS: tl.constexpr, GROUP: tl.constexpr, GATED: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
    SPLIT: tl.constexpr, SCALED: tl.constexpr, STAGES: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """A tile of `grouped_kernel`: sorted routes [first, last), all of expert e."""
    m = first + tl.arange(0, BM)
    exists = m < last
    source = tl.load(order + m, mask=exists, other=0) // top if GATED else m
    w, s = e.to(tl.int64) * words_stride, e.to(tl.int64) * scale_stride
    acc = tile_product(
        x + source.to(tl.int64) * x_stride, exists, words + w, high + w if high is not None else None,
        scale + s if scale is not None else None, zero + s if zero is not None else None,
        tl.program_id(0) * BN, bricks, groups, 0, bricks, BITS, GROUP, BN, BM, SPLIT, SCALED, STAGES, PTX,
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
) -> Parts:  # fmt: skip
    """Routed experts plus the shared one, for at most `first.tokens` tokens: two launches.

    Their parts are in FP32, one of a program that has some of a token's routes, the last the shared expert's.
    """
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
    routes = max(1, triton.next_power_of_2(top) // ROUTE_PARTS)
    parts = triton.cdiv(top, routes)
    y = torch.empty(tokens, parts + (shared_down is not None), down.n, device=device, dtype=torch.float32)
    route_down_kernel[(down.row_bricks * 16 // second.rows, tokens, y.shape[1])](
        h, inner, expert_TR, weight_TR, *down.tensors, down.bricks, down.groups, *_strides(down),
        *_shared(shared_down), shared_h, shared_inner, y, down.n, top, y.stride(0),
        BITS=down.bits, GROUP=down.group, **_shared_format(shared_down), PARTS=parts, ROUTES=routes, PTX=PTX,
        **second.options,
    )  # fmt: skip
    return Parts(y)


def many_tokens(
    x_TC: Tensor, weight_TR: Tensor, expert_TR: Tensor, gate_up: Packed, down: Packed,
    shared: tuple[Packed, Packed] | None, shared_TC: Tensor | None, first: Tile, second: Tile,
) -> Parts:  # fmt: skip
    """Routed experts and the shared one: three launches. Tiles alike in tokens.

    `shared`, gate·up and down, is run by the same launches; or else `shared_TC` is what the shared expert made of x.
    """
    tokens, top = expert_TR.shape
    device, dtype = x_TC.device, x_TC.dtype
    order, tiles = group(expert_TR, gate_up.experts, first.tokens)
    shared_tiles = 0 if shared is None else triton.cdiv(tokens, first.tokens)

    def run(x: Tensor, shared_x: Tensor | None, w: Packed, beside: Packed | None, tile: Tile, gated: bool):
        rows, shared_rows = (0 if p is None else p.row_bricks * 16 for p in (w, beside))
        grid = max(rows, shared_rows) // tile.rows, len(tiles) + shared_tiles
        rows, shared_rows = (n // 2 for n in (rows, shared_rows)) if gated else (w.n, beside.n if beside else 0)
        kind = dtype if gated or tokens > WIDE_TOKENS else torch.float32
        y = torch.empty(tokens * top, rows, device=device, dtype=kind)
        shared_y = None if beside is None else torch.empty(tokens, shared_rows, device=device, dtype=kind)
        grouped_kernel[grid](
            x, x.stride(0), order, tiles, weight_TR, *w.tensors, w.bricks, w.groups, *_strides(w), y, rows, top,
            shared_x, 0 if shared_x is None else shared_x.stride(0), *_shared(beside), shared_y, shared_rows, tokens,
            shared_tiles,
            BITS=w.bits, GROUP=w.group, **_shared_format(beside), GATED=gated, SCALED=tile.scaled,
            PTX=PTX, **tile.options,
        )  # fmt: skip
        return y, shared_y

    beside = shared or (None, None)
    routed, shared_h = run(x_TC, x_TC if shared else None, gate_up, beside[0], first, True)
    routed, made = run(routed, shared_h, down, beside[1], second, False)
    return Parts(routed.unflatten(0, (tokens, top)), made if shared else shared_TC)


def combine(parts: Parts, dtype: torch.dtype) -> Tensor:
    """The sum [T, C]: one launch."""
    tokens, rows, width = parts.rows_TRC.shape
    y = torch.empty(tokens, width, device=parts.rows_TRC.device, dtype=dtype)
    combine_kernel[(tokens, triton.cdiv(width, 1024))](parts.rows_TRC, parts.beside_TC, y, width, TOP=rows, BLOCK=1024)
    return y


def _shared(w: Packed | None) -> tuple:
    return (None, None, None, None, 0, 0) if w is None else (*w.tensors, w.bricks, w.groups)


def _shared_format(w: Packed | None) -> dict[str, int]:
    return {"SHARED_BITS": 0 if w is None else w.bits, "SHARED_GROUP": 0 if w is None else w.group}
