"""Routed experts and the shared one.

Routes are sorted by expert (`grouping`); a tile has routes that share an expert, or, of so few tokens that hardly two
do, one route. The first half of the work makes silu(gate) · up of each route, the second a weighted row, and
`combine_kernel`, or the next norm, adds a token's rows and the shared expert's in a fixed order. A decode step has both
halves in one launch (`joined`), which is what its few microseconds are worth; many tokens have a launch for each.
Shapes: h [T·R, I] in order of tiles; shared h [T, I].
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from klquant.kernels.bricks import Weight, tile_product
from klquant.kernels.linear.layout import Packed
from klquant.kernels.linear.tiles import Tile
from klquant.kernels.linear.triton import gated
from klquant.kernels.moe.grouping import group
from klquant.kernels.moe.offload import Offload
from klquant.kernels.moe.tiles import UNSORTED_TOKENS
from klquant.kernels.norm.parts import WIDE_TOKENS, Parts
from klquant.kernels.ptx import PTX


class Stack(NamedTuple):
    """A weight of each expert: as in `Weight`, and the elements from one's words, or scales, to the next one's.

    With `places` [E] an expert lies where that says: from `near` on at the far pointers, which are the host's memory.
    """

    words: tl.tensor
    high: tl.tensor | None
    scale: tl.tensor | None
    zero: tl.tensor | None
    bricks: tl.tensor
    groups: tl.tensor
    words_stride: tl.tensor
    scale_stride: tl.tensor
    far_words: tl.tensor | None
    far_high: tl.tensor | None
    far_scale: tl.tensor | None
    far_zero: tl.tensor | None
    places: tl.tensor | None
    near: tl.tensor


# Whether their number is a multiple of 16 helps nothing here, and would be one more kernel to build.
@triton.jit(do_not_specialize_on_alignment=["tokens", "shared_tiles", "near"])
def grouped_kernel(
    x, x_stride, order, tiles, weight, words, high, scale, zero, bricks, groups, words_stride, scale_stride,
    far_words, far_high, far_scale, far_zero, places, near, y, rows, top,
    shared_x, shared_x_stride, shared_words, shared_high, shared_scale, shared_zero, shared_bricks, shared_groups,
    shared_y, shared_rows, tokens, shared_tiles,
    BITS: tl.constexpr, GROUP: tl.constexpr, SHARED_BITS: tl.constexpr, SHARED_GROUP: tl.constexpr, GATED: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, SPLIT: tl.constexpr, SCALED: tl.constexpr, STAGES: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """GATED: x by token → y = silu(gate) · up by sorted route. Else: x by sorted route → y = weight · down by route.

    Grid (tiles of rows, `shared_tiles` tiles of tokens for the shared expert, then tiles of routes).
    """
    w = Stack(
        words, high, scale, zero, bricks, groups, words_stride, scale_stride, far_words, far_high, far_scale, far_zero,
        places, near,
    )  # fmt: skip
    shared = Weight(shared_words, shared_high, shared_scale, shared_zero, shared_bricks, shared_groups)
    _tile_of_half(
        tl.program_id(0), tl.program_id(1), x, x_stride, order, tiles, weight, w, y, rows, top,
        shared_x, shared_x_stride, shared, shared_y, shared_rows, tokens, shared_tiles,
        BITS, GROUP, SHARED_BITS, SHARED_GROUP, GATED, BN, BM, SPLIT, SCALED, STAGES, PTX,
    )  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=["tokens", "near"])
def joined_kernel(
    x, x_stride, order, tiles, weight, h, y, inner, rows, top, made,
    words, high, scale, zero, bricks, groups, words_stride, scale_stride, far_words, far_high, far_scale, far_zero,
    down_words, down_high, down_scale, down_zero, down_bricks, down_groups, down_words_stride, down_scale_stride,
    down_far_words, down_far_high, down_far_scale, down_far_zero, places, near,
    shared_words, shared_high, shared_scale, shared_zero, shared_bricks, shared_groups, shared_h, shared_inner,
    shared_down_words, shared_down_high, shared_down_scale, shared_down_zero, shared_down_bricks, shared_down_groups,
    shared_y, shared_rows, tokens, shared_tiles, each, first_programs, second_each,
    BITS: tl.constexpr, GROUP: tl.constexpr, DOWN_BITS: tl.constexpr, DOWN_GROUP: tl.constexpr,
    SHARED_BITS: tl.constexpr, SHARED_GROUP: tl.constexpr,
    SHARED_DOWN_BITS: tl.constexpr, SHARED_DOWN_GROUP: tl.constexpr,
    BN: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr, DOWN_BN: tl.constexpr, DOWN_SPLIT: tl.constexpr,
    DOWN_STAGES: tl.constexpr, BM: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Both halves in one launch: what the second reads of a tile is there when `made` [tiles] counts all its programs.

    x by token, h by tile, y by route. Grid (`first_programs` + the second half's,): `each` and `second_each` programs a
    tile. A card begins programs in order, so that whoever waits, waits for programs that are at work.
    """
    program = tl.program_id(0)
    if program < first_programs:
        tile = program // each
        w = Stack(
            words, high, scale, zero, bricks, groups, words_stride, scale_stride, far_words, far_high, far_scale,
            far_zero, places, near,
        )  # fmt: skip
        shared = Weight(shared_words, shared_high, shared_scale, shared_zero, shared_bricks, shared_groups)
        _tile_of_half(
            program % each, tile, x, x_stride, order, tiles, weight, w, h, inner, top,
            x, x_stride, shared, shared_h, shared_inner, tokens, shared_tiles,
            BITS, GROUP, SHARED_BITS, SHARED_GROUP, True, BN, BM, SPLIT, False, STAGES, PTX,
        )  # fmt: skip
        tl.debug_barrier()
        tl.atomic_add(made + tile, 1, sem="release")
    else:
        tile = (program - first_programs) // second_each
        there = tl.atomic_add(made + tile, 0, sem="acquire")
        while there < each:
            there = tl.atomic_add(made + tile, 0, sem="acquire")
        down = Stack(
            down_words, down_high, down_scale, down_zero, down_bricks, down_groups, down_words_stride,
            down_scale_stride, down_far_words, down_far_high, down_far_scale, down_far_zero, places, near,
        )  # fmt: skip
        shared_down = Weight(
            shared_down_words, shared_down_high, shared_down_scale, shared_down_zero, shared_down_bricks,
            shared_down_groups,
        )  # fmt: skip
        _tile_of_half(
            (program - first_programs) % second_each, tile, h, inner, order, tiles, weight, down, y, rows, top,
            shared_h, shared_inner, shared_down, shared_y, shared_rows, tokens, shared_tiles,
            DOWN_BITS, DOWN_GROUP, SHARED_DOWN_BITS, SHARED_DOWN_GROUP, False, DOWN_BN, BM, DOWN_SPLIT, False,
            DOWN_STAGES, PTX,
        )  # fmt: skip


@triton.jit
def _tile_of_half(
    row_tile, tile, x, x_stride, order, tiles, weight, w, y, rows, top,
    shared_x, shared_x_stride, shared, shared_y, shared_rows, tokens, shared_tiles,
    BITS: tl.constexpr, GROUP: tl.constexpr, SHARED_BITS: tl.constexpr, SHARED_GROUP: tl.constexpr, GATED: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, SPLIT: tl.constexpr, SCALED: tl.constexpr, STAGES: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """What a program of either kernel does for `row_tile` of the outputs of `tile`.

    Without an `order`, `tiles` has the expert of each route, which is a tile of its own.
    """
    OUT: tl.constexpr = BN // 2 if GATED else BN
    n = row_tile * OUT + tl.arange(0, OUT)
    if tile < shared_tiles:
        if SHARED_BITS > 0 and row_tile * OUT < shared_rows:
            m = tile * BM + tl.arange(0, BM)
            exists = m < tokens
            acc = tile_product(
                shared_x + m.to(tl.int64) * shared_x_stride, exists, shared, row_tile * BN, 0, shared.bricks,
                SHARED_BITS, SHARED_GROUP, BN, BM, SPLIT, SCALED, STAGES, PTX,
            )  # fmt: skip
            if GATED:
                acc = gated(acc)
            at = m.to(tl.int64)[None, :] * shared_rows + n[:, None]
            inside = exists[None, :] & (n < shared_rows)[:, None]
            tl.store(shared_y + at, acc.to(y.dtype.element_ty), mask=inside)
    else:
        own = tile - shared_tiles
        e = tl.load(tiles + own * 3 if order is not None else tiles + own)
        if e >= 0 and row_tile * OUT < rows:
            first = tl.load(tiles + own * 3 + 1) if order is not None else own
            last = tl.load(tiles + own * 3 + 2) if order is not None else own + 1
            routes = row_tile, x, x_stride, order, first, last, e, weight, w, y, rows, top
            # An expert's last tile is half empty half of the time, or nearly empty.
            if BM >= 128 and last - first <= BM // 4:
                _route_tile(*routes, BITS, GROUP, GATED, BN, BM // 4, SPLIT, SCALED, STAGES, PTX)
            elif BM >= 64 and last - first <= BM // 2:
                _route_tile(*routes, BITS, GROUP, GATED, BN, BM // 2, SPLIT, SCALED, STAGES, PTX)
            else:
                _route_tile(*routes, BITS, GROUP, GATED, BN, BM, SPLIT, SCALED, STAGES, PTX)


@triton.jit
def _route_tile(
    row_tile, x, x_stride, order, first, last, e, weight, w, y, rows, top,
    BITS: tl.constexpr, GROUP: tl.constexpr, GATED: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
    SPLIT: tl.constexpr, SCALED: tl.constexpr, STAGES: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Routes [first, last) of the order given, all of expert e."""
    m = first + tl.arange(0, BM)
    exists = m < last
    source = _at_places(order, m, exists) // top if GATED else m
    place = e if w.places is None else tl.load(w.places + e)
    inputs = x + source.to(tl.int64) * x_stride
    w_e = Weight(
        _at_place(w.words, w.far_words, place, w.words_stride, w.near),
        _at_place(w.high, w.far_high, place, w.words_stride, w.near) if w.high is not None else None,
        _at_place(w.scale, w.far_scale, place, w.scale_stride, w.near) if w.scale is not None else None,
        _at_place(w.zero, w.far_zero, place, w.scale_stride, w.near) if w.zero is not None else None,
        w.bricks, w.groups,
    )  # fmt: skip
    acc = tile_product(inputs, exists, w_e, row_tile * BN, 0, w.bricks, BITS, GROUP, BN, BM, SPLIT, SCALED, STAGES, PTX)
    if GATED:
        acc = gated(acc)
        target = m
    else:
        target = _at_places(order, m, exists)  # read again rather than held in registers until here
        acc = acc * tl.load(weight + target, mask=exists, other=0.0)[None, :]
    n = row_tile * acc.shape[0] + tl.arange(0, acc.shape[0])
    at = target.to(tl.int64)[None, :] * rows + n[:, None]
    tl.store(y + at, acc.to(y.dtype.element_ty), mask=exists[None, :] & (n < rows)[:, None])


@triton.jit
def _at_place(here, far, place, stride, near):
    """Where what an expert has of a stack begins."""
    if far is None:
        return here + place.to(tl.int64) * stride
    else:
        away = far + (place - near).to(tl.int64) * stride
        return tl.where(place < near, here + place.to(tl.int64) * stride, away)


@triton.jit
def _at_places(order, m, exists):
    """The routes at places m of the order given."""
    return tl.load(order + m, mask=exists, other=0) if order is not None else m


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


def many_tokens(
    x_TC: Tensor, weight_TR: Tensor, expert_TR: Tensor, gate_up: Packed, down: Packed,
    shared: tuple[Packed, Packed] | None, shared_TC: Tensor | None, first: Tile, second: Tile,
    offload: Offload | None = None,
) -> Parts:  # fmt: skip
    """Routed experts and the shared one: routes sorted, then a launch for each half. Tiles alike in tokens.

    `shared`, gate·up and down, is run by the same launches; or else `shared_TC` is what the shared expert made of x.
    """
    tokens, top = expert_TR.shape
    device, dtype = x_TC.device, x_TC.dtype
    order, tiles = group(expert_TR, offload.experts if offload else gate_up.experts, first.tokens)
    shared_tiles = 0 if shared is None else triton.cdiv(tokens, first.tokens)

    def run(
        x: Tensor, shared_x: Tensor | None, w: Packed, far: Packed | None, beside: Packed | None, tile: Tile,
        gated: bool,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        rows, shared_rows = (0 if p is None else p.row_bricks * 16 for p in (w, beside))
        grid = max(rows, shared_rows) // tile.rows, len(tiles) + shared_tiles
        rows, shared_rows = (n // 2 for n in (rows, shared_rows)) if gated else (w.n, beside.n if beside else 0)
        kind = dtype if gated or tokens > WIDE_TOKENS else torch.float32
        y = torch.empty(tokens * top, rows, device=device, dtype=kind)
        shared_y = None if beside is None else torch.empty(tokens, shared_rows, device=device, dtype=kind)
        grouped_kernel[grid](
            x, x.stride(0), order, tiles, weight_TR, *_stack(w, far), *_places(offload), y, rows, top,
            shared_x, 0 if shared_x is None else shared_x.stride(0), *_arguments(beside), shared_y, shared_rows,
            tokens, shared_tiles,
            **_format(w), **_format(beside, "SHARED_"), GATED=gated, SCALED=tile.scaled,
            PTX=PTX, **tile.options,
        )  # fmt: skip
        return y, shared_y

    beside, far = shared or (None, None), offload.far if offload else (None, None)
    routed, shared_h = run(x_TC, x_TC if shared else None, gate_up, far[0], beside[0], first, True)
    routed, made = run(routed, shared_h, down, far[1], beside[1], second, False)
    return Parts(routed.unflatten(0, (tokens, top)), made if shared else shared_TC)


def joined(
    x_TC: Tensor, weight_TR: Tensor, expert_TR: Tensor, gate_up: Packed, down: Packed,
    shared: tuple[Packed, Packed] | None, first: Tile, second: Tile, made: Tensor | None = None,
    offload: Offload | None = None,
) -> Parts:  # fmt: skip
    """`many_tokens` of a decode step, both halves in one launch: tiles alike in tokens and warps.

    `made`: T · (R + 1) zeros int32, which it does not leave so. Without, a launch makes them.
    """
    tokens, top = expert_TR.shape
    device, dtype = x_TC.device, x_TC.dtype
    shared_tiles = 0 if shared is None else triton.cdiv(tokens, first.tokens)
    order, tiles = None, expert_TR.view(-1)
    if tokens > UNSORTED_TOKENS:
        order, tiles = group(expert_TR, offload.experts if offload else gate_up.experts, first.tokens)
    count = len(tiles) + shared_tiles
    if made is None:
        made = torch.zeros(count, dtype=torch.int32, device=device)
    assert len(made) >= count, "too few counters"
    beside, far = shared or (None, None), offload.far if offload else (None, None)
    inner, shared_inner = (0 if w is None else w.row_bricks * 16 // 2 for w in (gate_up, beside[0]))
    h = torch.empty(tokens * top, inner, device=device, dtype=dtype)
    shared_h = torch.empty(tokens, shared_inner, device=device, dtype=dtype)
    y = torch.empty(tokens * top, down.n, device=device, dtype=torch.float32)
    shared_y = None if shared is None else torch.empty(tokens, down.n, device=device, dtype=torch.float32)
    each, second_each = 2 * max(inner, shared_inner) // first.rows, down.row_bricks * 16 // second.rows
    joined_kernel[((each + second_each) * count,)](
        x_TC, x_TC.stride(0), order, tiles, weight_TR, h, y, inner, down.n, top, made,
        *_stack(gate_up, far[0]), *_stack(down, far[1]), *_places(offload),
        *_arguments(beside[0]), shared_h, shared_inner,
        *_arguments(beside[1]), shared_y, down.n, tokens, shared_tiles, each, each * count, second_each,
        **_format(gate_up), **_format(down, "DOWN_"), **_format(beside[0], "SHARED_"),
        **_format(beside[1], "SHARED_DOWN_"),
        BN=first.rows, SPLIT=first.split, STAGES=first.stages, DOWN_BN=second.rows, DOWN_SPLIT=second.split,
        DOWN_STAGES=second.stages, BM=first.tokens, PTX=PTX, num_warps=first.warps,
    )  # fmt: skip
    return Parts(y.unflatten(0, (tokens, top)), shared_y)


def combine(parts: Parts, dtype: torch.dtype) -> Tensor:
    """The sum [T, C]: one launch."""
    tokens, rows, width = parts.rows_TRC.shape
    y = torch.empty(tokens, width, device=parts.rows_TRC.device, dtype=dtype)
    combine_kernel[(tokens, triton.cdiv(width, 1024))](parts.rows_TRC, parts.beside_TC, y, width, TOP=rows, BLOCK=1024)
    return y


def _arguments(w: Packed | None) -> tuple:
    """A weight as the kernels take it."""
    return (None, None, None, None, 0, 0) if w is None else (*w.tensors, w.bricks, w.groups)


def _stack(w: Packed, far: Packed | None) -> tuple:
    """A weight of all experts as the kernels take it, but for their places."""
    strides = w.words.stride(0), 0 if w.scale is None else w.scale.stride(0)
    return *_arguments(w), *strides, *(far.tensors if far else (None,) * 4)


def _places(offload: Offload | None) -> tuple[Tensor | None, int]:
    return (offload.place_E, offload.near) if offload else (None, 0)


def _format(w: Packed | None, prefix: str = "") -> dict[str, int]:
    return {f"{prefix}BITS": 0 if w is None else w.bits, f"{prefix}GROUP": 0 if w is None else w.group}
