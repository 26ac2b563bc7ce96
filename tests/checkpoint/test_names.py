"""Hub names: where a tensor is."""

import pytest

from klquant.checkpoint.names import place_of


@pytest.mark.parametrize(
    ("name", "layer", "inside", "unit", "routed"),
    [
        ("model.embed_tokens.weight", None, "model.embed_tokens.weight", "embedding", False),
        ("model.layers.0.mlp.up_proj.weight", 0, "mlp.up_proj.weight", "layer 0", False),
        ("model.layers.10.self_attn.q_proj", 10, "q_proj", "layer 10", False),
        (
            "model.layers.3.block_sparse_moe.experts.5.w2.weight_packed",
            3,
            "experts.5.w2.weight_packed",
            "layer 3",
            True,
        ),
        ("model.layers.3.block_sparse_moe.shared_experts.up_proj", 3, "shared_experts.up_proj", "layer 3", False),
        ("model.norm.weight", None, "model.norm.weight", "head", False),
        ("lm_head.weight_packed", None, "lm_head.weight_packed", "head", False),
    ],
)
def test_places(name, layer, inside, unit, routed):
    place = place_of(name)
    assert (*place, place.unit, place.routed) == (layer, inside, unit, routed)
