"""Prefill kernels at the 48B's shapes compile for cards that are not here, fit their memory and spill nothing."""

from collections.abc import Iterator
from itertools import cycle

import pytest
import torch

from klquant.kernels.kda.borders import Borders
from klquant.kernels.mla.pages import LatentPages
from tests.kernels.launches import CARDS
from tests.kernels.test_compile import launches, meta, problems
from tests.kernels.test_decode_compile import DIM, HEADS, LOW, NOPE, RANK, ROPE, STORED, TAPS, V, floats
from tests.triton_interpreter import interpreting, needs_triton

pytestmark = [needs_triton, pytest.mark.skipif(interpreting, reason="this process interprets kernels")]
TOKENS = 2048


def chunks(dtype: torch.dtype) -> Iterator:
    from klquant.kernels.kda import prefill as kda
    from klquant.kernels.mla import prefill as mla
    from klquant.kernels.norm import triton as norm

    width, heads = HEADS * DIM, meta(TOKENS, HEADS, DIM, dtype=dtype)
    tail, border = meta(1, 3 * width, TAPS - 1, dtype=dtype), torch.tensor([0, 40, TOKENS])
    low = meta(8, TOKENS, 2 * LOW + HEADS, dtype=dtype)[..., 2 * LOW :]
    two = (meta(2, 3 * width, TAPS - 1, dtype=dtype), Borders(border, border.to("meta")))
    padded = Borders(None, meta(2, dtype=torch.int64))
    for batch, *rest in ((1, tail), (8, None), (1, *two), (1, tail, padded)):
        yield lambda batch=batch, rest=rest: kda.prefill_inputs(
            meta(batch, TOKENS, 3 * width, dtype=dtype), low[:batch], meta(3 * width, TAPS, dtype=dtype), *rest
        )
    for o in (heads, heads.float()):
        yield lambda o=o: norm.gated_rms_norm(o, heads, meta(DIM, dtype=dtype), 1e-5)
    for stored in STORED:
        pages = LatentPages.empty(40, RANK + ROPE, stored or dtype, "meta")
        yield lambda pages=pages: mla.read_latent(pages, meta(TOKENS, dtype=torch.int64), dtype)
    kv, shared = meta(TOKENS, HEADS * (NOPE + V), dtype=dtype), meta(TOKENS, RANK + ROPE, dtype=dtype)[:, RANK:]
    yield lambda: mla.keys_values(kv, shared, HEADS, NOPE)
    o, total = meta(HEADS, TOKENS, NOPE + ROPE, dtype=dtype), floats(HEADS, TOKENS)
    for first, out in ((o, dtype), (o, torch.float32), (floats(HEADS, TOKENS, V), dtype)):
        yield lambda first=first, out=out: mla.join(first, total, o, total, V, out)


def test_prefill_launches(monkeypatch):
    found = launches(monkeypatch, chunks(torch.bfloat16))
    assert not problems(zip(found, cycle(CARDS), strict=False))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("card", CARDS)
def test_every_launch_on_every_card(card, dtype, monkeypatch, request):
    if "slow" not in request.config.option.markexpr:
        pytest.skip("minutes: run it with -m slow")
    assert not problems((launch, card) for launch in launches(monkeypatch, chunks(dtype)))
