"""A layer of a chunk through the fused weights is `klquant.model`'s, chunk after chunk; on a GPU but for rounding."""

from itertools import pairwise

import pytest
import torch

from klquant.engine import prefill
from klquant.engine.build import OneDevice
from klquant.engine.prefill import ChunkRows, Span, numbers, prefill_layer
from klquant.engine.state import DeviceState
from klquant.engine.synthetic import random_weights, synthetic_outline
from klquant.model.block import block, new_state
from klquant.model.kda import kda_mix
from klquant.model.mla import mla_mix
from tests.recipe.build import index

# Heads as wide as the 48B's.
CONFIG = index(
    hidden_size=512, moe_intermediate_size=256, num_attention_heads=4, num_key_value_heads=4, kv_lora_rank=512,
    qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
    linear_attn_config={
        "full_attn_layers": [4], "kda_layers": [1, 2, 3], "head_dim": 128, "num_heads": 4, "short_conv_kernel_size": 4,
    },
)[0]  # fmt: skip
KDA, MLA, SLOT = 1, 3, 2
# Shorter than the taps, around a tile's and a block's borders. One position alone is a step of decoding.
CHUNKS = (2, 3, 65, 64, 2, 200)


def case(device, dtype):
    torch.manual_seed(0)
    places = OneDevice(torch.device(device), CONFIG.num_layers, packed=device == "cuda")
    weights = random_weights(synthetic_outline(CONFIG, "int4"), places, dtype)
    sizes = {"slots": 4, "pages": 9, "max_context": 512, "cache_bits": 16}
    state = DeviceState.empty(CONFIG, range(CONFIG.num_layers), **sizes, dtype=dtype, device=places.device)
    state.bind(SLOT, [8, 3, 5, 0, 7, 1])
    state.clear(SLOT)
    starts = [sum(CHUNKS[:i]) for i in range(len(CHUNKS) + 1)]
    x_SC = torch.randn(starts[-1], CONFIG.hidden_size, device=device).to(dtype)
    spans = [Span(range(a, b), SLOT, a) for a, b in pairwise(starts)]
    return weights, state, x_SC, spans


def relative(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def check_mixers(device, dtype, limit, monkeypatch):
    """Each chunk by both paths from states of their own; past latents in more than one block."""
    monkeypatch.setattr("klquant.model.mla.LATENT_BLOCK", 50)
    weights, state, x_SC, spans = case(device, dtype)
    for layer, ours, models in ((KDA, prefill.kda_mix, kda_mix), (MLA, prefill.mla_mix, mla_mix)):
        w, other = weights.layers[layer], new_state(CONFIG, layer, 1, dtype, device)
        for span in spans:
            x = x_SC[span.start : span.stop]
            got = ours(CONFIG, layer, w.fused, x, state, ChunkRows.of(state, [span]))
            want = models(CONFIG, w.model.attn, x[None], other)[0]
            assert got.dtype == dtype
            assert relative(got, want) < limit, (layer, span.start)
        if layer == KDA:
            assert relative(state.kda[layer].s[SLOT], other.s[0]) < limit
            # Three products of other shapes made what the fused one did.
            assert relative(state.kda[layer].conv[SLOT], other.conv[0]) < limit


def check_sequences_together(device, dtype, limit):
    """Spans of several sequences at once, by `model` one by one; the second ones go on where the first ended."""
    weights, state, *_ = case(device, dtype)
    for slot, pages in {2: [8, 3, 5], 0: [0, 7], 3: [1, 4]}.items():
        state.bind(slot, pages)
        state.clear(slot)
    for layer, ours, models in ((KDA, prefill.kda_mix, kda_mix), (MLA, prefill.mla_mix, mla_mix)):
        w, seen = weights.layers[layer], dict.fromkeys((2, 0, 3), 0)
        others = {slot: new_state(CONFIG, layer, 1, dtype, device) for slot in seen}
        for lengths in ({2: 130, 0: 2, 3: 63}, {0: 70, 2: 3}, {3: 1, 2: 2}):
            spans = [Span(range(n), slot, seen[slot]) for slot, n in lengths.items()]
            x_SC = torch.randn(sum(lengths.values()), CONFIG.hidden_size, device=device).to(dtype)
            got = ours(CONFIG, layer, w.fused, x_SC, state, ChunkRows.of(state, spans)).split([*lengths.values()])
            for span, mine, x in zip(spans, got, x_SC.split([*lengths.values()]), strict=True):
                assert relative(mine, models(CONFIG, w.model.attn, x[None], others[span.slot])[0]) < limit, (
                    layer,
                    span,
                )
                seen[span.slot] = span.stop
        if layer == KDA:
            for slot, other in others.items():
                assert relative(state.kda[layer].s[slot], other.s[0]) < limit
                assert relative(state.kda[layer].conv[slot], other.conv[0]) < limit
            assert not state.kda[layer].s[1].any() and not state.kda[layer].conv[1].any()


@torch.no_grad()
def test_mixers(monkeypatch):
    check_mixers("cpu", torch.float32, 1e-5, monkeypatch)


def check_padding(device, dtype, limit, start=0):
    """A prompt alone and with padding behind it, in a slot that another sequence left: the same, and no trace of what
    the padding holds. And what lies behind `start` tokens, as many as the host does not know."""
    weights, state, x_SC, _ = case(device, dtype)
    for layer, ours in ((KDA, prefill.kda_mix), (MLA, prefill.mla_mix)):
        w, found = weights.layers[layer].fused, []
        for count in (1, 2, 5, 64, 70):
            span = Span(range(start, start + count), SLOT, start)
            for rows, fill in ((count, 0), (96, 1.0), (96, -30.0)):
                state.clear(SLOT)
                if start:
                    before = ChunkRows.of(state, [Span(range(start), SLOT, 0)])
                    ours(CONFIG, layer, w, x_SC[:start], state, before)
                chunk = ChunkRows.of(state, [span])
                if rows > count:
                    chunk = ChunkRows.padded(state, numbers([span], rows).to(device), behind=start > 0)
                own = x_SC[start : start + count]
                x = torch.cat([own, torch.full((rows - count, x_SC.shape[1]), fill).to(x_SC)])
                y = ours(CONFIG, layer, w, x, state, chunk)
                assert y.isfinite().all()
                found.append([y[:count]])
                if layer == KDA:
                    found[-1] += [state.kda[layer].s[SLOT].clone(), state.kda[layer].conv[SLOT].clone()]
            for padded in found[-2:]:
                assert all(relative(a, b) < limit for a, b in zip(padded, found[-3], strict=True)), (layer, count)


@pytest.mark.parametrize("start", [0, 1, 66, 200])
@torch.no_grad()
def test_padding_behind_a_prompt(start):
    check_padding("cpu", torch.float32, 1e-5, start)


@pytest.mark.parametrize("behind", [False, True])
@torch.no_grad()
def test_nothing_but_padding_leaves_a_slot_as_it_is(behind):
    weights, state, x_SC, _ = case("cpu", torch.float32)
    for each in (*state.kda.values(),):
        each.s.normal_(), each.conv.normal_()
    for pages in state.latent.values():
        pages.data.normal_()
    before = [t.clone() for each in state.kda.values() for t in (each.s, each.conv)]
    latents = [pages.data.clone() for pages in state.latent.values()]
    chunk = ChunkRows.padded(state, numbers([Span((), 0, 0)], 32), behind=behind)
    for layer in range(CONFIG.num_layers):
        prefill_layer(CONFIG, layer, weights.layers[layer], (x_SC[:32], None), state, chunk)
    after = [t for each in state.kda.values() for t in (each.s, each.conv)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(torch.equal(a, b.data) for a, b in zip(latents, state.latent.values(), strict=True))


@torch.no_grad()
def test_mixers_of_several_sequences():
    check_sequences_together("cpu", torch.float32, 1e-5)


@torch.no_grad()
def test_one_position_is_a_step():
    """Chunks of 1 among others, in FP32."""
    weights, state, x_SC, _ = case("cpu", torch.float32)
    for layer in (KDA, MLA):
        w, other, start = weights.layers[layer], new_state(CONFIG, layer, 1, torch.float32, "cpu"), 0
        for length in (1, 1, 70, 1, 1):
            x = x_SC[start : start + length]
            chunk = ChunkRows.of(state, [Span(range(length), SLOT, start)])
            h, delta = prefill_layer(CONFIG, layer, w, (x, None), state, chunk)
            assert relative(h + delta, block(CONFIG, w.model, x[None], other)[0]) < 1e-5
            start += length


@pytest.mark.gpu
@torch.no_grad()
def test_mixers_on_a_gpu(monkeypatch):
    """Both paths round to BF16 at the same places: they differ where the order of FP32 sums tips a rounding."""
    check_mixers("cuda", torch.bfloat16, 2**-7, monkeypatch)


@pytest.mark.parametrize("start", [0, 1, 66, 200])
@pytest.mark.gpu
@torch.no_grad()
def test_padding_behind_a_prompt_on_a_gpu(start):
    check_padding("cuda", torch.bfloat16, 2**-7, start)


@pytest.mark.gpu
@torch.no_grad()
def test_mixers_of_several_sequences_on_a_gpu():
    check_sequences_together("cuda", torch.bfloat16, 2**-7)


@pytest.mark.gpu
@torch.no_grad()
def test_a_layer_on_a_gpu():
    """The dense one: rounding moves no routes there."""
    weights, state, x_SC, spans = case("cuda", torch.bfloat16)
    w, other = weights.layers[0], new_state(CONFIG, 0, 1, torch.bfloat16, "cuda")
    for span in spans:
        x = x_SC[span.start : span.stop]
        h, delta = prefill_layer(CONFIG, 0, w, (x, None), state, ChunkRows.of(state, [span]))
        assert relative(h + delta, block(CONFIG, w.model, x[None], other)[0]) < 2**-7
