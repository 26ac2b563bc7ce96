"""A draw from what top-k, top-p and min-p leave, without sorting the vocabulary.

All that stay are at or above one logit, the *cut*, which is found digit by digit: bits that rise with a logit are eight
digits of four. A launch a digit: programs add up, for their part of the vocabulary, how many tokens (top-k) or how much
probability (top-p) has digit d or more among those that agree with the cut so far, and each program of the next launch
finds from all sums which digit the cut has. Of tokens that equal the cut the first stay, as many as are still wanted.
Sums are made in a fixed order: the same token whoever shares the batch.
Shapes: B rows, P parts of the vocabulary, N slots; tables have a row [B] a step.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from klquant.kernels.sample.triton import noisy, ordered, token_kernel

BLOCK = 2048
DIGITS = 8
# Rows of the tables: the steps of the search for top-k's cut and of top-p's; what top-k found; what both found.
MASS_STEPS, FLOOR, FINAL = (tl.constexpr(i) for i in (DIGITS, 2 * DIGITS, 2 * DIGITS + 1))
STEPS = 2 * DIGITS + 2
WIDTH = tl.constexpr(16)


@triton.jit
def _logits(z, z_stride, seen, penalty, here, row, v, vocab):
    """Logits behind the repetition penalty, FP32; −∞ past the vocabulary."""
    x = tl.load(z + row * z_stride + v, mask=v < vocab, other=float("-inf")).to(tl.float32)
    by = tl.load(penalty + here)
    asks = tl.where(by == 1.0, 0, vocab)
    known = tl.load(seen + here.to(tl.int64) * vocab + v, mask=v < asks, other=0) != 0
    return tl.where(known, tl.where(x > 0, x / by, x * by), x)


@triton.jit
def _rising(x):
    """uint32 that rise with FP32 x."""
    return ordered(x).to(tl.uint32, bitcast=True) ^ 0x80000000


@triton.jit
def _value(key):
    """The FP32 of such a key."""
    order = (key ^ 0x80000000).to(tl.int32, bitcast=True)
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _largest(most, row, parts, PARTS: tl.constexpr):
    i = tl.arange(0, PARTS)
    return tl.max(tl.load(most + row * parts + i, mask=i < parts, other=float("-inf")), 0)


@triton.jit
def _mass(x, largest, t):
    """Probability relative to the likeliest token's."""
    return tl.exp((x - largest) / tl.where(t > 0, t, 1.0))


@triton.jit
def _next(key, above, target, sums, at, shift, limit, parts, PARTS: tl.constexpr, MASS: tl.constexpr):
    """What the sums of a step tell: the cut's digits so far, what lies above all that have them, what is wanted, what
    those that have them weigh. at: where the step's row of the tables has this one."""
    i, d = tl.arange(0, PARTS)[:, None], tl.arange(0, WIDTH)
    s = tl.sum(tl.load(sums + (at * parts + i) * WIDTH + d[None, :], mask=i < parts, other=0.0), 0)
    over, wanted = tl.load(above + at), tl.load(target + at)
    if MASS:
        # Only the first step's sums are of everything.
        wanted = tl.where(shift == 4 * (8 - 1), limit * tl.max(s, 0), wanted)
    digit = tl.max(tl.where(over + s >= wanted, d, 0), 0)
    more = tl.sum(tl.where(d == digit + 1, s, 0.0), 0)
    weight = tl.sum(tl.where(d == digit, s, 0.0), 0) - more
    found = tl.load(key + at).to(tl.uint32, bitcast=True) | (digit.to(tl.uint32) << shift)
    return found, over + more, wanted, weight


@triton.jit
def largest_kernel(z, z_stride, seen, penalty, slot, most, vocab, BLOCK: tl.constexpr):
    """most [B, P]: the largest logit of a part, ∞ if one is no number. Grid (rows, parts), as of the next three."""
    row = tl.program_id(0).to(tl.int64)
    v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = _logits(z, z_stride, seen, penalty, tl.load(slot + row), row, v, vocab)
    tl.store(most + row * tl.num_programs(1) + tl.program_id(1), tl.max(tl.where(x < float("inf"), x, float("inf")), 0))


@triton.jit(do_not_specialize=["step"])
def search_kernel(
    z, z_stride, seen, penalty, temperature, top_k, top_p, slot, most, key, above, target, sums, rows, step, vocab,
    MASS: tl.constexpr, FIRST: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """sums [STEPS, B, P, WIDTH] of one step, and its row of the tables."""
    row = tl.program_id(0).to(tl.int64)
    part, parts = tl.program_id(1), tl.num_programs(1)
    here = tl.load(slot + row)
    limit = tl.load(top_p + here) if MASS else tl.load(top_k + here).to(tl.float32)
    at = step * rows + row
    shift = 4 * (8 - 1 - step % 8)
    if limit < (1.0 if MASS else vocab):
        v = part * BLOCK + tl.arange(0, BLOCK)
        x = _logits(z, z_stride, seen, penalty, here, row, v, vocab)
        k = _rising(x)
        cut = tl.zeros([], tl.uint32)
        over, wanted = 0.0, limit
        weight = tl.where(v < vocab, 1.0, 0.0)
        if not FIRST:
            cut, over, wanted, _ = _next(key, above, target, sums, at - rows, shift + 4, limit, parts, PARTS, MASS)
        if MASS:
            floor, share = tl.zeros([], tl.uint32), 1.0
            if FIRST:
                many = tl.load(top_k + here).to(tl.float32)
                if many < vocab:
                    floor, below, _, equal = _next(key, above, target, sums, at - rows, 0, many, parts, PARTS, False)
                    many -= below
                    share = many / equal
                if part == 0:
                    tl.store(key + FLOOR * rows + row, floor.to(tl.int32, bitcast=True))
                    tl.store(above + FLOOR * rows + row, share)
                    tl.store(target + FLOOR * rows + row, many)
            else:
                floor = tl.load(key + FLOOR * rows + row).to(tl.uint32, bitcast=True)
                share = tl.load(above + FLOOR * rows + row)
            # Of those that equal top-k's cut some stay: each counts as much of itself.
            mass = _mass(x, _largest(most, row, parts, PARTS), tl.load(temperature + here))
            weight = weight * tl.where(k > floor, mass, tl.where(k == floor, mass * share, 0.0))
        if part == 0:
            tl.store(key + at, cut.to(tl.int32, bitcast=True))
            tl.store(above + at, over)
            tl.store(target + at, wanted)
        agrees = (k >> shift) >> 4 == (cut >> shift) >> 4
        digit = ((k >> shift) & 15).to(tl.int32)
        i = tl.arange(0, WIDTH)
        s = tl.zeros([WIDTH], tl.float32)
        for d in tl.static_range(WIDTH):
            s = tl.where(i == d, tl.sum(tl.where(agrees & (digit >= d), weight, 0.0), 0), s)
        tl.store(sums + (at * parts + part) * WIDTH + i, s)


@triton.jit
def equal_kernel(
    z, z_stride, seen, penalty, temperature, top_k, top_p, slot, most, key, above, target, sums, equal, rows, vocab,
    PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The tables' last row: the cut and how many of those that equal it stay; equal [B, P]: how many there are."""
    row = tl.program_id(0).to(tl.int64)
    part, parts = tl.program_id(1), tl.num_programs(1)
    here = tl.load(slot + row)
    most_tokens, most_mass = tl.load(top_k + here).to(tl.float32), tl.load(top_p + here)
    cut, many = tl.zeros([], tl.uint32), 0.0
    if most_mass < 1.0:
        at = FLOOR * rows + row
        cut, over, wanted, _ = _next(key, above, target, sums, at - rows, 0, most_mass, parts, PARTS, True)
        mass = _mass(_value(cut), _largest(most, row, parts, PARTS), tl.load(temperature + here))
        many = tl.maximum(tl.ceil((wanted - over) / mass), 1.0)
        if cut == tl.load(key + at).to(tl.uint32, bitcast=True):
            many = tl.minimum(many, tl.load(target + at))
    elif most_tokens < vocab:
        at = MASS_STEPS * rows + row
        cut, over, _, _ = _next(key, above, target, sums, at - rows, 0, most_tokens, parts, PARTS, False)
        many = most_tokens - over
    if part == 0:
        tl.store(key + FINAL * rows + row, cut.to(tl.int32, bitcast=True))
        tl.store(target + FINAL * rows + row, many)
    v = part * BLOCK + tl.arange(0, BLOCK)
    x = _logits(z, z_stride, seen, penalty, here, row, v, vocab)
    tl.store(equal + row * parts + part, tl.sum(((_rising(x) == cut) & (v < vocab)).to(tl.int32), 0))


@triton.jit
def kept_kernel(
    z, z_stride, seen, penalty, temperature, min_p, seed, slot, position, most, key, target, equal, best, rows, vocab,
    PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """best [B, P] as `best_kernel` has it, of those that stay."""
    row = tl.program_id(0).to(tl.int64)
    part, parts = tl.program_id(1), tl.num_programs(1)
    here = tl.load(slot + row)
    v = part * BLOCK + tl.arange(0, BLOCK)
    x = _logits(z, z_stride, seen, penalty, here, row, v, vocab)
    t = tl.load(temperature + here)
    cut = tl.load(key + FINAL * rows + row).to(tl.uint32, bitcast=True)
    many = tl.load(target + FINAL * rows + row)
    i = tl.arange(0, PARTS)
    before = tl.sum(tl.load(equal + row * parts + i, mask=i < part, other=0), 0)
    k = _rising(x)
    ties = k == cut
    rank = before + tl.cumsum(ties.to(tl.int32), 0)
    largest = _largest(most, row, parts, PARTS)
    stays = ((k > cut) | (ties & (rank <= many))) & (_mass(x, largest, t) >= tl.load(min_p + here)) & (v < vocab)
    order = ordered(noisy(x, t, tl.load(seed + here), tl.load(position + row), v))
    order = tl.where((largest < float("inf")) & (largest > float("-inf")), order, 0x7FFFFFFF)
    found = (order.to(tl.int64) << 32) | (0x7FFFFFFF - v)
    lowest = tl.full([BLOCK], -0x8000000000000000, tl.int64)
    tl.store(best + row * parts + part, tl.max(tl.where(stays | (order == 0x7FFFFFFF), found, lowest), 0))


def draw_narrowed(
    z_BV: Tensor, seen_NV: Tensor, temperature_N: Tensor, top_k_N: Tensor, top_p_N: Tensor, min_p_N: Tensor,
    penalty_N: Tensor, seed_N: Tensor, slot_B: Tensor, position_B: Tensor,
) -> Tensor:  # fmt: skip
    """As `klquant.kernels.sample.dispatch` has it."""
    rows, vocab = z_BV.shape
    parts, device = triton.cdiv(vocab, BLOCK), z_BV.device
    sizes = {"PARTS": triton.next_power_of_2(parts), "BLOCK": BLOCK, "num_warps": 4}
    most = torch.empty(rows, parts, device=device)
    equal = torch.empty(rows, parts, dtype=torch.int32, device=device)
    best = torch.empty(rows, parts, dtype=torch.int64, device=device)
    key = torch.empty(STEPS, rows, dtype=torch.int32, device=device)
    above, target = torch.empty(2, STEPS, rows, device=device)
    sums = torch.empty(2 * DIGITS, rows, parts, WIDTH.value, device=device)
    token = torch.empty(rows, dtype=torch.int64, device=device)
    grid, seen = (rows, parts), seen_NV.view(torch.int8)
    logits = z_BV, z_BV.stride(0), seen, penalty_N
    tables = most, key, above, target, sums
    largest_kernel[grid](*logits, slot_B, most, vocab, BLOCK=BLOCK, num_warps=4)
    for step in range(2 * DIGITS):
        search_kernel[grid](
            *logits, temperature_N, top_k_N, top_p_N, slot_B, *tables, rows, step, vocab, MASS=step >= DIGITS,
            FIRST=step % DIGITS == 0, **sizes,
        )  # fmt: skip
    equal_kernel[grid](*logits, temperature_N, top_k_N, top_p_N, slot_B, *tables, equal, rows, vocab, **sizes)
    kept_kernel[grid](
        *logits, temperature_N, min_p_N, seed_N, slot_B, position_B, most, key, target, equal, best, rows, vocab,
        **sizes,
    )  # fmt: skip
    token_kernel[(rows,)](best, token, seen, slot_B, vocab, parts, BLOCK=triton.next_power_of_2(parts), num_warps=1)
    return token
