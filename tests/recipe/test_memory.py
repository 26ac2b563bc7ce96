import pytest

from klquant.checkpoint.index import read_tensor_index
from klquant.recipe.memory import (
    CARDS,
    GIB,
    STAGING_MOST,
    Memory,
    WeightSizes,
    contexts,
    kda_state_bytes,
    latent_bytes,
    offloaded,
    predict_memory,
    staging_bytes,
)
from klquant.recipe.plan import make_plan
from klquant.recipe.schema import load_recipe
from tests.recipe.build import index

MIB = 1 << 20


@pytest.fixture(scope="module")
def big(kimi_48b):
    return read_tensor_index(kimi_48b)


def sizes(big, recipe: str) -> WeightSizes:
    return make_plan(load_recipe(recipe), *big).weight_sizes


def test_cache_and_state_of_the_48b_are_those_of_the_facts(big):
    config = big[0]
    assert 7 * latent_bytes(config, 16) == 8_064
    state = predict_memory(config, sizes(big, "int4"), 8_192)
    assert state.kda_state / MIB == pytest.approx(40 + 1.4, abs=0.05)
    assert 20 * kda_state_bytes(config) == state.kda_state
    long = predict_memory(config, sizes(big, "int4"), 1 << 20)
    assert long.latent_cache / GIB == pytest.approx(7.9, abs=0.05)
    short = predict_memory(config, sizes(big, "int4"), 1 << 20, cache_bits=8)
    assert short.latent_cache / GIB == pytest.approx(3.95, abs=0.05)


@pytest.mark.parametrize(("name", "gib"), [("int8", 46.1), ("int4-g32", 26.2), ("int4", 24.2), ("int3", 18.7)])
def test_weights_of_the_48b_without_the_embedding(big, name, gib):
    memory = predict_memory(big[0], sizes(big, name), 8_192, embedding_on_cpu=True)
    assert memory.weights / GIB == pytest.approx(gib, abs=0.1)


def test_int3_fits_one_24_gb_card_and_int4_two(big):
    def fits(name, **kw):
        return predict_memory(big[0], sizes(big, name), kw.pop("context", 131_072), **kw).fits()

    assert "24 GB" in fits("int3") and "24 GB" not in fits("int4")
    assert "2×24 GB" in fits("int4", context=1 << 20)
    assert fits("int8") == ["80 GB"]


def test_what_fits_with_experts_on_the_host(big):
    """A card that holds it is not named; a smaller one leaves more; what leaves is whole experts of every layer."""
    config, weights = big[0], sizes(big, "int4")
    memory = predict_memory(config, weights, 8_192, embedding_on_cpu=True)
    found = offloaded(config, weights, memory)
    assert list(found) == ["12 GB", "16 GB", "24 GB"]
    assert found["12 GB"] > found["16 GB"] > found["24 GB"] >= memory.total - CARDS["24 GB"][1] * GIB
    assert not any(size % (sum(weights.routed) // config.num_experts) for size in found.values())
    assert not offloaded(config, WeightSizes(0, weights.layers, 0, (0,) * config.num_layers), memory)


def test_sequences_multiply_the_state_only(big):
    one, many = (predict_memory(big[0], sizes(big, "int4"), 8_192, sequences=n) for n in (1, 16))
    assert many.kda_state == 16 * one.kda_state
    assert many.latent_cache == one.latent_cache
    assert many.workspace > one.workspace  # a row of logits each


def test_parts_add_up(big):
    m = predict_memory(big[0], sizes(big, "int4"), 131_072, embedding_on_cpu=True)
    assert sum(m.stages) == m.weights + m.latent_cache + m.kda_state
    assert m.needed(1) == m.total
    assert m.total / 2 < m.needed(2) < m.total / 2 + 2 * GIB


def test_two_cards_take_the_best_split():
    parts = dict.fromkeys(("context", "sequences", "cache_bits", "weights", "latent_cache", "kda_state"), 0)
    stages = 7, 1, 1, 1, 8
    memory = Memory(**parts | {"weights": 18}, embedding_on_cpu=False, workspace=10, runtime=5, stages=stages, reads=())
    assert memory.needed(2) == 9 + 15  # 7 1 1 | 1 8
    assert memory.needed(3) == 8 + 15


def test_sizes_by_place_of_packed_and_plain_names():
    of = WeightSizes.of(
        {
            "model.embed_tokens.weight": 1, "model.layers.0.mlp.up_proj.weight_packed": 2,
            "model.layers.1.self_attn.A_log": 4, "model.layers.1.mlp.up_proj.weight_scale": 8,
            "model.norm.weight": 16, "lm_head.weight_packed": 32,
            "model.layers.1.block_sparse_moe.experts.0.w1.weight_packed": 64,
        },
        2,
    )  # fmt: skip
    assert of == WeightSizes(1, (2, 76), 48, (0, 64))
    assert of.total == 127


def test_contexts_stop_at_what_the_model_can():
    assert contexts(index()[0]) == [4096]
    assert contexts(index(model_max_length=131_072)[0]) == [8_192, 131_072]


@pytest.mark.parametrize(
    ("largest", "layers", "room"),
    [(1000, 8, 2000), (1000, 7, 0), (STAGING_MOST // 2, 8, STAGING_MOST), (STAGING_MOST // 2 + 1, 26, 0), (0, 26, 0)],
)
def test_experts_come_back_through_room_for_two_layers(largest, layers, room):
    """At most half a GiB, and at most a quarter of what left: of fewer than eight layers two are more than that."""
    assert staging_bytes(largest, layers) == room
