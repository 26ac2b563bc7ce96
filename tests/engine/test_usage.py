from functools import partial

import pytest
import torch

from klquant.engine.build import OneDevice
from klquant.engine.placement import PARTS, longest_context, plan_placement
from klquant.engine.sizes import held_sizes
from klquant.engine.state import DeviceState
from klquant.engine.synthetic import parse_synthetic, random_weights, synthetic_outline
from klquant.engine.usage import measured_usage, predicted_usage, step_traffic
from klquant.engine.weights import storage_bytes
from klquant.kernels.mla.pages import pages_for
from klquant.recipe.memory import GIB
from tests.engine.build import CPU
from tests.engine.test_synthetic import CONFIG

CARD = torch.device("cuda", 0)


def test_what_is_held_is_what_was_predicted():
    """Weights and states to the byte; on a CPU the rest is not measured."""
    outline = synthetic_outline(CONFIG, "int4")
    sizes = held_sizes(outline, torch.bfloat16)
    placement = plan_placement(CONFIG, sizes, {CPU: 64 * GIB}, context=1024, sequences=3)
    assert all(row.actual is None for row in predicted_usage(placement))
    weights = random_weights(outline, placement, torch.bfloat16)
    room = {"slots": 3, "pages": pages_for(1024), "max_context": 1024, "cache_bits": 16}
    layers = range(CONFIG.num_layers)
    empty = partial(DeviceState.empty, CONFIG, **room, dtype=torch.bfloat16, device=CPU)
    rows = measured_usage(placement, weights, [empty(layers[:2]), empty(layers[2:])])
    assert [row.part for row in rows] == list(PARTS)
    for row in rows[:3]:
        assert row.actual == row.predicted > 0
    assert [row.actual for row in rows[3:]] == [None, None]


def test_an_embedding_beside_the_card_is_listed():
    sizes = held_sizes(synthetic_outline(CONFIG, "int4"), torch.bfloat16)
    memory = plan_placement(CONFIG, sizes, {CARD: 64 * GIB}, context=1024).memory
    placement = plan_placement(CONFIG, sizes, {CARD: memory.total - 1}, context=1024)
    *rows, last = predicted_usage(placement)
    assert (last.device, last.part, last.predicted) == (CPU, "weights", sizes.embedding)
    assert sum(row.predicted for row in rows) == memory.total - sizes.embedding


def test_the_longest_context_fits_and_no_longer_one():
    config, _ = parse_synthetic("kimi-linear-48b")
    sizes, cards = held_sizes(synthetic_outline(config, "int4"), torch.bfloat16), {CARD: 30 * GIB}
    longest = longest_context(config, sizes, cards, context=1 << 20, sequences=4)
    assert 0 < longest < 1 << 20
    options = {"context": longest, "sequences": 4}
    assert plan_placement(config, sizes, cards, **options).memory.context == longest
    assert longest_context(config, sizes, cards, context=4096, sequences=4) == 4096
    assert longest_context(config, sizes, {CARD: 20 * GIB}, context=4096) == 0


def test_a_step_reads_what_the_facts_say():
    """The 48B at batch 1 reads about 2.5 GB of weights; its latents are 8,064 bytes a token, its state 41 MiB."""
    config, _ = parse_synthetic("kimi-linear-48b")
    sizes = held_sizes(synthetic_outline(config, "int4"), torch.bfloat16)
    one = step_traffic(config, sizes, 1, 1000, 16)
    assert one.always_active + one.routed_experts == pytest.approx(2.5e9, rel=0.05)
    assert one.latent_cache == 8_064_000
    assert one.kda_state / 2 / (1 << 20) == pytest.approx(41.4, abs=0.05)
    many = step_traffic(config, sizes, 64, 1000, 8)
    assert many.always_active == one.always_active
    assert one.routed_experts * 20 < many.routed_experts < sum(sizes.routed)
    assert many.latent_cache == 64 * 1000 * 7 * 580


def test_shared_storage_counts_once():
    whole = torch.zeros(10, 4)
    assert storage_bytes({"a": whole[:3], "b": [whole[3:]]}, whole) == {CPU: 160}
    weights = random_weights(synthetic_outline(CONFIG, "int8"), OneDevice(CPU, 4), torch.bfloat16)
    assert storage_bytes(weights, weights.layers) == weights.nbytes()
