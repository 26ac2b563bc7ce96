"""Routes sorted by expert, on the device: one launch, no atomics, no host.

Program e counts the routes of lower experts and lists its own, in order, behind them. A tile is up to t routes of one
expert. Expert e, whose routes are [lo, hi) of the sorted list, owns the tiles lo // t + e … hi // t + e, or, where
routes are so few that it makes less of them, lo … hi − 1: at least as many as it needs and disjoint from the others',
so that no program has to know any other's count.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 4096


@triton.jit
def group_kernel(
    expert, order, tiles, routes, BLOCK: tl.constexpr, TOKENS: tl.constexpr, OWN: tl.constexpr, FEW: tl.constexpr
):
    """order [routes] and tiles [·, 3] (expert or −1, first, last) of expert [routes], all int32; grid (experts).

    TOKENS: most routes of a tile. FEW: an expert owns as many tiles as it has routes, not hi // t − lo // t + 1. BLOCK
    routes are looked at, and OWN tiles written, at a time.
    """
    e = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    lower = tl.zeros([BLOCK], tl.int32)
    equal = tl.zeros([BLOCK], tl.int32)
    for start in range(0, routes, BLOCK):
        chosen = tl.load(expert + start + i, mask=start + i < routes, other=2147483647)
        lower += (chosen < e).to(tl.int32)
        equal += (chosen == e).to(tl.int32)
    first = tl.sum(lower, 0)
    last = first + tl.sum(equal, 0)
    at = first
    for start in range(0, routes, BLOCK):
        own = tl.load(expert + start + i, mask=start + i < routes, other=2147483647) == e
        rank = tl.cumsum(own.to(tl.int32), 0)
        tl.store(order + at + rank - 1, start + i, mask=own)
        at += tl.max(rank, 0)
    slot = first if FEW else first // TOKENS + e
    own_tiles = last - slot if FEW else last // TOKENS + e + 1 - slot
    t = tl.arange(0, OWN)
    for start in range(0, own_tiles, OWN):
        row = first + (start + t) * TOKENS
        where = tiles + (slot + start + t) * 3
        inside = start + t < own_tiles
        tl.store(where, tl.where(row < last, e, -1), mask=inside)
        tl.store(where + 1, row, mask=inside)
        tl.store(where + 2, tl.minimum(row + TOKENS, last), mask=inside)


def group(expert_TR: Tensor, experts: int, tile_tokens: int) -> tuple[Tensor, Tensor]:
    """expert [T, R] int32 → order [T·R], the routes t·R + r by expert, and tiles [·, 3]: expert or −1, first, last."""
    routes = expert_TR.numel()
    order = torch.empty(routes, dtype=torch.int32, device=expert_TR.device)
    most = routes // tile_tokens + experts
    tiles = torch.empty(min(routes, most), 3, dtype=torch.int32, device=expert_TR.device)
    group_kernel[(experts,)](
        expert_TR, order, tiles, routes, BLOCK=min(CHUNK, max(128, triton.next_power_of_2(routes))),
        TOKENS=tile_tokens, OWN=32, FEW=routes < most, num_warps=4,
    )  # fmt: skip
    return order, tiles
