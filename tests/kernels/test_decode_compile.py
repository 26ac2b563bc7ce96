"""Decode kernels at the 48B's shapes compile for cards that are not here, fit their shared memory and spill nothing.

Each launch is compiled for one of the cards in turn; with `-m slow` for all.
"""

from collections.abc import Iterator
from itertools import cycle

import pytest
import torch

from klquant.kernels.kda.tiles import decode_tile as kda_tile
from klquant.kernels.kda.weights import KDADecode
from klquant.kernels.mla.pages import LatentPages
from klquant.kernels.mla.tiles import decode_tile
from tests.kernels.launches import CARDS, Launch
from tests.kernels.test_compile import launches, meta, problems
from tests.triton_interpreter import interpreting, needs_triton

pytestmark = [needs_triton, pytest.mark.skipif(interpreting, reason="this process interprets kernels")]
HIDDEN, HEADS, DIM, TAPS, LOW = 2304, 32, 128, 4, 128
RANK, ROPE, NOPE, V = 512, 64, 128, 128
EXPERTS, TOP = 256, 8
# Programs that share the inputs of an output projection, of up to 8 tokens and of more.
PARTS, MORE_PARTS = 3, 6
STORED = (None, torch.float8_e4m3fn, torch.int8)


def floats(*shape: int) -> torch.Tensor:
    return meta(*shape, dtype=torch.float32)


def kda_step(dtype: torch.dtype, early: bool) -> Iterator:
    from klquant.kernels.kda import triton as kda

    width = HEADS * DIM
    w = KDADecode(
        meta(3 * width, TAPS, dtype=dtype), floats(HEADS), floats(width), meta(width, LOW, dtype=dtype),
        meta(width, LOW, dtype=dtype), meta(DIM, dtype=dtype),
    )  # fmt: skip
    yield lambda: kda.kda_decode(
        meta(4, 3 * width, dtype=dtype), meta(4, 2 * LOW + HEADS, dtype=dtype), w,
        meta(9, 3 * width, TAPS - 1, dtype=dtype), floats(9, HEADS, DIM, DIM), meta(4, dtype=torch.int32), 1e-5,
        kda_tile(early),
    )  # fmt: skip


def write_steps(dtype: torch.dtype, early: bool) -> Iterator:
    from klquant.kernels.mla import write

    for stored in STORED:
        pages = LatentPages.empty(9, RANK + ROPE, stored or dtype, "meta")
        kv_a, position = meta(4, RANK + ROPE, dtype=dtype), meta(4, dtype=torch.int64)
        yield lambda kv_a=kv_a, pages=pages, position=position: write.write_latent(
            kv_a, meta(RANK, dtype=dtype), pages, position, early
        )


def steps(dtype: torch.dtype) -> Iterator:
    """The launches that do not depend on the card."""
    from klquant.kernels.moe import router
    from klquant.kernels.norm import triton as norm
    from klquant.kernels.norm.parts import Parts

    yield from kda_step(dtype, early=False)
    yield from write_steps(dtype, False)
    h, delta, weight = floats(4, HIDDEN), meta(4, HIDDEN, dtype=dtype), meta(HIDDEN, dtype=dtype)
    yield lambda: norm.add_rms_norm(h, delta, weight, 1e-5, meta(4, 16, dtype=torch.int32))
    yield lambda: norm.add_rms_norm(h, None, weight, 1e-5)
    yield lambda: norm.add_rms_norm(delta, None, weight, 1e-5)
    yield lambda: norm.add_rms_norm(h, Parts(floats(4, TOP, HIDDEN), delta), weight, 1e-5)
    yield lambda: norm.add_rms_norm(h, Parts(floats(4, TOP, HIDDEN), floats(4, HIDDEN)), weight, 1e-5)
    for tokens, rows in (4, PARTS), (16, MORE_PARTS):
        total, parts = floats(tokens, HIDDEN), Parts(floats(tokens, rows, HIDDEN))
        yield lambda total=total, parts=parts: norm.add_rms_norm(total, parts, weight, 1e-5)
    yield lambda: norm.add_rms_norm(floats(100, HIDDEN), meta(100, HIDDEN, dtype=dtype), weight, 1e-5)
    choice = floats(EXPERTS, HIDDEN), floats(EXPERTS), TOP, 2.446, True
    for tokens in (1, 2, 4, 8, 64):
        x, turn = meta(tokens, HIDDEN, dtype=dtype), meta(tokens, dtype=torch.int32)
        if tokens <= 4:
            parts = Parts(floats(tokens, PARTS, HIDDEN))
            yield lambda parts=parts, turn=turn: router.add_rms_norm_route(
                floats(*turn.shape, HIDDEN), parts, weight, 1e-5, *choice, turn
            )
        else:
            total = floats(tokens, HIDDEN)
            yield lambda x=x, turn=turn, total=total: router.route_normed(total, x, weight, 1e-5, *choice, turn)


def mla_step(dtype: torch.dtype, batch: int, card: int, stored: torch.dtype | None) -> Iterator:
    from klquant.kernels.mla import triton as mla

    pages = LatentPages.empty(9, RANK + ROPE, stored or dtype, "meta")
    q, kv_b = meta(batch, HEADS, NOPE + ROPE, dtype=dtype), meta(HEADS * (NOPE + V), RANK, dtype=dtype)
    table, length = meta(batch, 2048, dtype=torch.int32), meta(batch, dtype=torch.int32)
    tile = decode_tile(batch, 2048 * 64, 132, staged=card == 90)
    yield lambda: mla.mla_decode(q, kv_b, pages, table, length, 0.07, tile)


def attends(monkeypatch, card: int, dtype: torch.dtype = torch.bfloat16) -> list[Launch]:
    """The launches of mla_decode on `card`, batch 1 and more."""
    groups = [mla_step(dtype, batch, card, stored) for stored in STORED for batch in (1, 32)]
    return launches(monkeypatch, *groups)


def test_decode_launches(monkeypatch):
    found = launches(monkeypatch, steps(torch.bfloat16))
    assert not problems(zip(found, cycle(CARDS), strict=False))


def test_what_starts_early(monkeypatch):
    """Instructions that a card has from sm90 on."""
    found = launches(monkeypatch, kda_step(torch.bfloat16, early=True))
    for dtype in (torch.bfloat16, torch.float16):
        found += launches(monkeypatch, write_steps(dtype, True))
        found += launches(monkeypatch, *(mla_step(dtype, 1, 90, stored) for stored in STORED))
    found = dict.fromkeys(found)
    assert not problems((launch, 90) for launch in found)


@pytest.mark.parametrize("card", [89, 90])
def test_attention_launches(card, monkeypatch):
    assert not problems((launch, card) for launch in attends(monkeypatch, card))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("card", CARDS)
def test_every_launch_on_every_card(card, dtype, monkeypatch, request):
    if "slow" not in request.config.option.markexpr:
        pytest.skip("minutes: run it with -m slow")
    found = launches(monkeypatch, steps(dtype)) + attends(monkeypatch, card, dtype)
    assert not problems((launch, card) for launch in found)


def test_parts_keep_a_card_busy():
    for processors in (68, 82, 128, 132):
        assert decode_tile(1, 1 << 20, processors).splits == processors
        for batch in range(1, processors + 1):
            programs = batch * decode_tile(batch, 1 << 20, processors).splits
            turns = -(-programs // processors)
            assert programs / (turns * processors) > 0.75
            assert turns <= 4
    assert decode_tile(1, 100, 132).splits == 4
    assert decode_tile(1, 100, 132, staged=True).splits == 2
