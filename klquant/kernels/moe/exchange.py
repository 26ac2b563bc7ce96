"""Experts change places between the card and the host's memory, in two launches: who, and their bytes."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from klquant.kernels.linear.layout import Packed
from klquant.kernels.moe.offload import Offload

# Pairs that change places in a step at most: two tokens' experts.
MOST = 16
# Programs that move a pair, and 32-bit words that one has on their way at a time.
PIECES, WORDS = 32, 2048


@triton.jit(do_not_specialize=["routes", "near"])
def choose_pairs_kernel(
    expert, slot, routes, top, place, used, totals, pairs, near, experts,
    BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr, PIECE: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """pairs [MOST, 2]: row in far of one that is chosen, row on the card of one that is not, or −1; one program.

    Those chosen come in by number, those that were not chosen for the longest go out. Rows whose slot is −1 are
    padding, and choose nothing.
    """
    now = tl.load(totals) + 1
    r = tl.arange(0, BLOCK_R)
    for start in range(0, routes, BLOCK_R):
        lives = tl.load(slot + (start + r) // top, mask=start + r < routes, other=-1) >= 0
        chosen = tl.load(expert + start + r, mask=lives, other=-1)
        tl.store(used + chosen, now, mask=(chosen >= 0) & (chosen < experts))
    tl.debug_barrier()
    e = tl.arange(0, BLOCK_E)
    last = tl.load(used + e, mask=e < experts, other=-1)
    at = tl.load(place + e, mask=e < experts, other=0)
    comes = (last == now) & (at >= near)
    goes = (last != now) & (at < near) & (e < experts)
    missing = tl.sum(comes.to(tl.int32), 0)
    count = tl.minimum(tl.minimum(missing, tl.sum(goes.to(tl.int32), 0)), MOST)
    k = tl.arange(0, MOST)
    tl.store(pairs + 2 * k, -1, mask=k >= count)
    if count > 0:
        order_in = tl.cumsum(comes.to(tl.int32), 0) - 1
        order_out = tl.zeros([BLOCK_E], tl.int32)
        for start in range(0, experts, PIECE):
            o = start + tl.arange(0, PIECE)
            other = tl.load(used + o, mask=o < experts, other=now)
            idle = (other != now) & (tl.load(place + o, mask=o < experts, other=near) < near)
            before = (other[None, :] < last[:, None]) | ((other[None, :] == last[:, None]) & (o[None, :] < e[:, None]))
            order_out += tl.sum((idle[None, :] & before).to(tl.int32), 1)
        comes = comes & (order_in < count)
        goes = goes & (order_out < count)
        tl.store(pairs + 2 * order_in, at - near, mask=comes)
        tl.store(pairs + 2 * order_out + 1, at, mask=goes)
        tl.debug_barrier()
        tl.store(place + e, tl.load(pairs + 2 * order_in + 1, mask=comes, other=0), mask=comes)
        tl.store(place + e, tl.load(pairs + 2 * order_out, mask=goes, other=0) + near, mask=goes)
    tl.store(totals, now)
    tl.store(totals + 1, tl.load(totals + 1) + tl.sum((last == now).to(tl.int64), 0))
    tl.store(totals + 2, tl.load(totals + 2) + missing)


@triton.jit
def exchange_kernel(pairs, near, far, sizes, WORDS: tl.constexpr):
    """Each pair's weights change places; grid (programs a pair, pairs). near and far: tensors of 32-bit words, of which
    an expert has `sizes`."""
    row = tl.load(pairs + 2 * tl.program_id(1))
    if row >= 0:
        slot = tl.load(pairs + 2 * tl.program_id(1) + 1)
        w = tl.arange(0, WORDS)
        for i in tl.static_range(len(sizes)):
            here = near[i] + slot.to(tl.int64) * sizes[i]
            there = far[i] + row.to(tl.int64) * sizes[i]
            for start in range(tl.program_id(0) * WORDS, sizes[i], tl.num_programs(0) * WORDS):
                inside = start + w < sizes[i]
                goes = tl.load(here + start + w, mask=inside)
                comes = tl.load(there + start + w, mask=inside)
                tl.store(here + start + w, comes, mask=inside)
                tl.store(there + start + w, goes, mask=inside)


def exchange(offload: Offload, gate_up: Packed, down: Packed, expert_TR: Tensor, slot_T: Tensor) -> None:
    """Bring the chosen experts to the card, as far as MOST go: expert [T, R] int32, slot [T] int32 (−1: padding)."""
    pairs = torch.empty(MOST, 2, dtype=torch.int32, device=expert_TR.device)
    routes, experts = expert_TR.numel(), offload.experts
    choose_pairs_kernel[(1,)](
        expert_TR, slot_T, routes, expert_TR.shape[1], offload.place_E, offload.used_E, offload.totals, pairs,
        offload.near, experts, BLOCK_R=64, BLOCK_E=triton.next_power_of_2(experts), PIECE=16, MOST=MOST, num_warps=4,
    )  # fmt: skip
    near, far = (_words(a) + _words(b) for a, b in ((gate_up, down), offload.far))
    exchange_kernel[(PIECES, MOST)](
        pairs, near, far, tuple(t[0].numel() for t in near), WORDS=WORDS, num_warps=4,
    )  # fmt: skip


def _words(w: Packed) -> tuple[Tensor, ...]:
    """A weight's tensors as 32-bit words [experts, ·]."""
    return tuple(t.view(len(t), -1).view(torch.int32) for t in w.tensors if t is not None)
