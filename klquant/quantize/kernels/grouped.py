"""Work on tokens grouped by expert, a launch for all experts: second moments of inputs, and linear maps.

Rows are sorted by expert; those of expert e are [bounds[e], bounds[e + 1]). Which rows share a launch, and how many
experts do, changes no result: a sum goes over an expert's own rows in their order.
Shape suffixes: T = tokens, R = routed rows, E = experts, K = inputs, N = outputs.
"""

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from klquant.quantize.kernels.numeric import round_bf16

TILE = 128
GRAM_TOKENS = 32
LINEAR_INPUTS = 64


@triton.jit
def add_gram(
    x, star, rows, bounds, total, k,
    TILE: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """One tile of total[e] += Σ a bᵀ over the rows of expert e, with b = x and a = x, or a = star − x where given.

    x, star [T, K] BF16; rows [R] int64 or None (row r is token r); bounds [E + 1] int32; total [E, K, K] FP32. Without
    `star` the sum is symmetric: a tile above the diagonal is stored a second time below it.
    """
    i, j, e = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    if star is None and j < i:
        return
    first, last = tl.load(bounds + e), tl.load(bounds + e + 1)
    if first == last:
        return
    left, right = i * TILE + tl.arange(0, TILE), j * TILE + tl.arange(0, TILE)
    tokens = tl.arange(0, TOKENS)
    acc = tl.zeros([TILE, TILE], tl.float32)
    for start in range(first, last, TOKENS):
        inside = start + tokens < last
        row = (start + tokens).to(tl.int64)
        if rows is not None:
            row = tl.load(rows + row, mask=inside, other=0)
        place = row[:, None] * k
        at_left = place + left[None, :]
        a = tl.load(x + at_left, mask=inside[:, None] & (left < k)[None, :], other=0.0)
        b = tl.load(x + place + right[None, :], mask=inside[:, None] & (right < k)[None, :], other=0.0)
        if star is not None:
            s = tl.load(star + at_left, mask=inside[:, None] & (left < k)[None, :], other=0.0)
            a = round_bf16(s.to(tl.float32) - a.to(tl.float32)).to(tl.bfloat16)
        acc = tl.dot(tl.trans(a), b, acc)
    total += e * k * k
    here = total + left[:, None] * k + right[None, :]
    within = (left < k)[:, None] & (right < k)[None, :]
    acc += tl.load(here, mask=within, other=0.0)
    tl.store(here, acc, mask=within)
    if star is None and j > i:
        tl.store(total + right[None, :] * k + left[:, None], acc, mask=within)


@triton.jit
def map_rows(
    x, rows, tiles, gate, up, out, k, n,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    """A tile of up to ROWS rows of one expert × COLUMNS outputs: out = x upᵀ, or silu(x gateᵀ) · (x upᵀ) with a gate.

    x [T, K] BF16; rows [R] int64 or None; tiles [·, 3] int32: expert, first row, row behind the last;
    gate, up [E, N, K] BF16; out [R, N] BF16. Every product, SiLU included, is rounded as torch rounds it.
    """
    column, tile = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), tiles + tl.program_id(1) * 3
    e, first, last = tl.load(tile).to(tl.int64), tl.load(tile + 1), tl.load(tile + 2)
    at = (first + tl.arange(0, ROWS)).to(tl.int64)
    inside = at < last
    row = tl.load(rows + at, mask=inside, other=0) if rows is not None else at
    inputs = tl.arange(0, INPUTS)
    left = x + row[:, None] * k + inputs[None, :]
    weight = e * n * k + column[None, :] * k + inputs[:, None]
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    gates = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, k, INPUTS):
        within = start + inputs < k
        a = tl.load(left + start, mask=inside[:, None] & within[None, :], other=0.0)
        mask = within[:, None] & (column < n)[None, :]
        acc = tl.dot(a, tl.load(up + weight + start, mask=mask, other=0.0), acc)
        if gate is not None:
            gates = tl.dot(a, tl.load(gate + weight + start, mask=mask, other=0.0), gates)
    result = round_bf16(acc)
    if gate is not None:
        g = round_bf16(gates)
        result = round_bf16(round_bf16(g / (1.0 + tl.exp(-g))) * result)
    result = result.to(tl.bfloat16)
    tl.store(out + at[:, None] * n + column[None, :], result, mask=inside[:, None] & (column < n)[None, :])


def accumulate(
    total_EKK: Tensor, x_TK: Tensor, rows_R: Tensor | None, bounds: Sequence[int], star_TK: Tensor | None = None
) -> None:
    """total[e] += Σ x xᵀ, or Σ (star − x) xᵀ, over the rows of each expert. See `add_gram`."""
    e, k, _ = total_EKK.shape
    assert total_EKK.is_contiguous() and x_TK.is_contiguous() and (star_TK is None or star_TK.is_contiguous())
    edges = torch.tensor(bounds, dtype=torch.int32, device=x_TK.device)
    tiles = triton.cdiv(k, TILE)
    with torch.cuda.device_of(x_TK):
        add_gram[(tiles, tiles, e)](
            x_TK, star_TK, rows_R, edges, total_EKK, k, TILE=TILE, TOKENS=GRAM_TOKENS, num_warps=8, num_stages=3
        )


def linear(
    x_TK: Tensor, rows_R: Tensor | None, bounds: Sequence[int], up_ENK: Tensor, gate_ENK: Tensor | None = None
) -> Tensor:
    """BF16 [R, N] of each expert's rows through its own weights. See `map_rows`."""
    _, n, k = up_ENK.shape
    assert x_TK.is_contiguous() and up_ENK.is_contiguous() and (gate_ENK is None or gate_ENK.is_contiguous())
    out = torch.empty(bounds[-1], n, dtype=x_TK.dtype, device=x_TK.device)
    table = [
        (e, start, last)
        for e, (first, last) in enumerate(itertools.pairwise(bounds))
        for start in range(first, last, TILE)
    ]
    if not table:
        return out
    tiles = torch.tensor(table, dtype=torch.int32, device=x_TK.device)
    # Two accumulators of half the width take the registers of one.
    columns = TILE if gate_ENK is None else TILE // 2
    with torch.cuda.device_of(x_TK):
        map_rows[(triton.cdiv(n, columns), len(table))](
            x_TK, rows_R, tiles, gate_ENK, up_ENK, out, k, n,
            ROWS=TILE, COLUMNS=columns, INPUTS=LINEAR_INPUTS, num_warps=8, num_stages=3,
        )  # fmt: skip
    return out
