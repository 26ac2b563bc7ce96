"""Random models: the shape of the real one, the bytes of the plan, activations that stay sane."""

import json

import pytest
import torch

from klquant.checkpoint.config import KimiLinearConfig
from klquant.checkpoint.names import expected_tensors
from klquant.engine.build import OneDevice
from klquant.engine.sizes import held_bytes, held_sizes
from klquant.engine.synthetic import parse_synthetic, random_weights, synthetic_outline, synthetic_plan
from klquant.engine.weights import storage_bytes
from klquant.errors import UserError
from tests.engine.build import CPU, general_path
from tests.recipe.build import index

CONFIG = index(
    hidden_size=512, intermediate_size=512, moe_intermediate_size=256, num_attention_heads=4, num_key_value_heads=4
)[0]


def test_the_48b_is_the_hubs(kimi_48b):
    raw = json.loads((kimi_48b / "config.json").read_text())
    assert parse_synthetic("kimi-linear-48b") == (KimiLinearConfig.from_dict(raw), 27)


def test_the_48b_takes_the_plans_bytes():
    """All but what disk and device store differently: a shape beside each packed weight, the router in FP32."""
    config, _ = parse_synthetic("kimi-linear-48b")
    for recipe in ("int4", "int3"):
        plan = synthetic_plan(config, recipe)
        held = held_bytes(synthetic_outline(config, recipe), torch.bfloat16)
        for d in plan.decisions:
            fp32 = d.key.role in ("gate", "A_log", "dt_bias", "e_score_correction_bias")
            shape_tensor = 16 if d.spec is not None else 0
            assert held[d.key.name] == (2 if fp32 else 1) * d.bytes_after - shape_tensor, d.key.name


@pytest.mark.parametrize("recipe", ["int4", "int3", "int8"])
def test_random_weights_take_the_predicted_bytes_and_keep_activations_sane(recipe):
    outline = synthetic_outline(CONFIG, recipe)
    weights = random_weights(outline, OneDevice(CPU, CONFIG.num_layers), torch.float32)
    sizes = held_sizes(outline, torch.float32)
    assert weights.nbytes() == {CPU: sizes.total}
    assert sizes.layers == tuple(storage_bytes(layer)[CPU] for layer in weights.layers)
    model = general_path(weights)
    ids = torch.randint(0, CONFIG.vocab_size, (2, 40))
    with torch.no_grad():
        hidden, logits = model.hidden(ids), model.logits(ids)
    assert 0.5 < hidden.std() < 20
    assert 0.5 < logits.std() < 2


def test_the_seed_decides(tmp_path):
    outline = synthetic_outline(CONFIG, "int4")
    a, b, c = (random_weights(outline, OneDevice(CPU, 4), torch.float32, seed).head.proj.weight for seed in (1, 1, 2))
    assert torch.equal(a.words, b.words) and not torch.equal(a.words, c.words)


def test_fewer_layers_are_the_first_ones():
    config, count = parse_synthetic("kimi-linear-48b:layers=5")
    assert count == 5
    few = synthetic_outline(config, "int4", count)
    assert few.config.mla_layers == {3}
    assert (
        held_sizes(few, torch.bfloat16).layers
        == held_sizes(synthetic_outline(config, "int4"), torch.bfloat16).layers[:5]
    )
    assert list(few.shapes) == [n for n in expected_tensors(config) if n in few.shapes]


@pytest.mark.parametrize("text", ["kimi", "kimi-linear-48b:", "kimi-linear-48b:layers=0", "kimi-linear-48b:layers=28",
                                  "kimi-linear-48b:layers=x", "kimi-linear-48b:depth=3"])  # fmt: skip
def test_unknown_models_and_options_are_refused(text):
    with pytest.raises(UserError, match="kimi-linear-48b"):
        parse_synthetic(text)
