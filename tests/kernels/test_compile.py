"""Kernels compile for cards that are not here, fit their shared memory and spill nothing.

Each launch the dispatch can make at the model's shapes is compiled for one of the cards in turn; with `-m slow`, which
takes minutes, for all of them.
"""

from collections.abc import Iterable, Iterator
from itertools import cycle

import pytest
import torch

from klquant.kernels.linear import dispatch as linear_dispatch
from klquant.kernels.linear.dispatch import QuantMLP, apply_linear, pack_mlp, pack_weight
from klquant.kernels.linear.tiles import linear_tile, parts_tile
from klquant.kernels.moe import dispatch as moe_dispatch
from klquant.kernels.moe.dispatch import QuantExperts, apply_experts, expert_parts
from klquant.kernels.moe.offload import Offload
from tests.kernels.launches import CARDS, Launch, compile_for, meta_weight, record
from tests.triton_interpreter import interpreting, needs_triton

pytestmark = [needs_triton, pytest.mark.skipif(interpreting, reason="this process interprets kernels")]
HIDDEN, INNER, EXPERTS, TOP = 2304, 1024, 256, 8
# One token count for each row of the tables in tiles.py.
LINEAR_TOKENS = (1, 16, 32, 64, 128, 256, 4096)
EXPERT_TOKENS = (1, 2, 16, 64, 256, 1024, 4096, 16384)


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def linear(bits: int, group: int = 128, symmetric: bool = True, dtype: torch.dtype = torch.bfloat16) -> Iterator:
    for tokens in LINEAR_TOKENS:
        for n in (4096, 6720, 576):
            w = pack_weight(meta_weight((n, HIDDEN), bits, group, symmetric))
            yield lambda w=w, tokens=tokens: apply_linear(meta(tokens, HIDDEN, dtype=dtype), w)


def linear_beside(dtype: torch.dtype = torch.bfloat16) -> Iterator:
    """A step's projections of KDA, and beside them what its gates read."""
    from klquant.kernels.linear import triton

    w = pack_weight(meta_weight((3 * 4096, HIDDEN), 8))
    for tokens in (8, 16, 32, 64):
        x, plain = meta(tokens, HIDDEN, dtype=dtype), meta(288, HIDDEN, dtype=dtype)
        yield lambda x=x, plain=plain: triton.linear_beside(x, w, linear_tile(w, len(x), False, False), plain)


def linear_in_parts(
    bits: int, group: int = 128, symmetric: bool = True, dtype: torch.dtype = torch.bfloat16
) -> Iterator:
    """A step's output projection."""
    from klquant.kernels.linear import triton

    w = pack_weight(meta_weight((HIDDEN, 4096), bits, group, symmetric))
    for tokens in (8, 16, 32, 64, 128):
        x, tile = meta(tokens, 4096, dtype=dtype), parts_tile(w, tokens)
        yield lambda x=x, tile=tile: triton.linear_in_parts(x, w, *tile)


def experts(bits: int, shared_bits: int, group: int = 128, dtype: torch.dtype = torch.bfloat16) -> Iterator:
    shapes = ((INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER))
    shared = QuantMLP(*pack_mlp(*(meta_weight(s, shared_bits, group) for s in shapes)))
    w = QuantExperts(*pack_mlp(*(meta_weight((EXPERTS, *s), bits, group) for s in shapes)), shared)
    for tokens in EXPERT_TOKENS:
        x = meta(tokens, HIDDEN, dtype=dtype)
        weight, chosen = meta(tokens, TOP, dtype=torch.float32), meta(tokens, TOP, dtype=torch.int32)
        yield lambda args=(w, x, weight, chosen): apply_experts(*args)
    for tokens in LINEAR_TOKENS:
        yield lambda tokens=tokens: apply_linear(meta(tokens, HIDDEN, dtype=dtype), shared.gate_up, gated=True)


def offloaded(bits: int, shared_bits: int, group: int = 128) -> Iterator:
    """Experts of which some lie in the host's memory, and how they change places."""
    shapes = ((INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER))
    shared = QuantMLP(*pack_mlp(*(meta_weight(s, shared_bits, group) for s in shapes)))
    near, far = (
        pack_mlp(*(meta_weight((count, *s), bits, group) for s in shapes)) for count in (EXPERTS - 33, 33)
    )  # fmt: skip
    w = QuantExperts(*near, shared, Offload.of(EXPERTS - 33, tuple(far), "meta"))
    for tokens in EXPERT_TOKENS:
        x = meta(tokens, HIDDEN)
        weight, chosen = meta(tokens, TOP, dtype=torch.float32), meta(tokens, TOP, dtype=torch.int32)
        args = w, x, weight, chosen, None, meta(tokens, dtype=torch.int32)
        yield lambda args=args: expert_parts(*args)


def router() -> Iterator:
    from klquant.kernels.moe.router import route

    yield lambda: route(meta(4, EXPERTS, dtype=torch.float32), meta(EXPERTS, dtype=torch.float32), TOP, 2.446, True)


def launches(monkeypatch, *groups: Iterator) -> list[Launch]:
    found = dict.fromkeys(launch for group in groups for run in group for launch in record(run, monkeypatch))
    return list(found)


def problems(pairs: Iterable[tuple[Launch, int]]) -> list[str]:
    """Launches that do not fit a card, spill more than the few words ptxas trades for another block beside, or are
    known to be compiled wrongly."""
    tried = ((launch, card, compile_for(launch, card)) for launch, card in pairs)
    return [
        f"sm{card} {launch}: {used}"
        for launch, card, used in tried
        if used.shared > CARDS[card] * 1024 or used.spilled > 16 or used.stray
    ]


def test_the_int4_recipe(monkeypatch):
    groups = linear(8), linear_beside(), linear_in_parts(8), experts(4, 8), router()
    assert not problems(zip(launches(monkeypatch, *groups), cycle(CARDS), strict=False))


@pytest.mark.parametrize("bits", [4, 3])
def test_offloaded_experts(bits, monkeypatch):
    found = launches(monkeypatch, offloaded(bits, 8))
    assert {"choose_pairs_kernel", "exchange_kernel"} < {launch.kernel.__name__ for launch in found}
    assert not problems(zip(found, cycle((89, 90, 86, 80)), strict=False))


def test_wide_tiles_on_hopper(monkeypatch):
    for module in (moe_dispatch, linear_dispatch):
        monkeypatch.setattr(module, "has_wgmma", lambda x: True)
    found = launches(monkeypatch, experts(4, 8), experts(3, 8, 32), experts(16, 16), linear(8))
    most = [launch for launch in found if dict(launch.constants).get("BM", 0) >= 128]
    assert len(most) > 4 and not problems((launch, 90) for launch in most)


@pytest.mark.parametrize(
    "group",
    [
        linear(3),
        linear(4, 32, False),
        linear(8, -1, False, torch.float16),
        linear(16),
        linear(4, dtype=torch.float16),
        linear_in_parts(3, 32, False),
        linear_in_parts(4),
    ],
    ids=[
        "INT3",
        "INT4 g32 asym",
        "INT8 row asym FP16",
        "BF16",
        "INT4 FP16",
        "INT3 g32 asym, in parts",
        "INT4, in parts",
    ],
)
def test_other_formats(group, monkeypatch):
    found = launches(monkeypatch, group)
    assert not problems([(found[0], 89), (found[-1], 90)])


@pytest.mark.slow
@pytest.mark.parametrize("card", CARDS)
def test_every_launch_on_every_card(card, monkeypatch, request):
    if "slow" not in request.config.option.markexpr:
        pytest.skip("minutes: run it with -m slow")
    plain = [f(bits, dtype=dtype) for f in (linear, linear_in_parts) for bits in (3, 4, 8, 16)
             for dtype in (torch.bfloat16, torch.float16)]  # fmt: skip
    other = [f(bits, group, symmetric) for f in (linear, linear_in_parts) for bits in (3, 4, 8) for group in (32, -1)
             for symmetric in (True, False)]  # fmt: skip
    mixed = [experts(4, 8), experts(3, 8), experts(8, 8), experts(4, 16, 32), experts(16, 16)]
    more = linear_beside(), linear_beside(torch.float16), router()
    assert not problems((launch, card) for launch in launches(monkeypatch, *plain, *other, *mixed, *more))
