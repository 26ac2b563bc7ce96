"""What klquant.json says about a model's making, folded by class and layer."""

import json

import pytest

from klquant.checkpoint.config import KimiLinearConfig
from klquant.errors import UserError
from klquant.evaluate.quantization import calibrated_on, quantization
from tests.tiny import tiny_config

CONFIG = KimiLinearConfig.from_dict(tiny_config())
EXPERT = "model.layers.{}.block_sparse_moe.experts.{}.w1"
PROVENANCE = {
    "recipe": {"name": "int4"},
    "target": "klquant",
    "tensors": {
        EXPERT.format(1, 0): {"error": 0.1, "measured": "outputs"},
        EXPERT.format(1, 1): {"error": 0.3, "measured": "outputs"},
        EXPERT.format(2, 0): {"error": 0.5, "measured": "weights"},
        "lm_head": {"error": 0.01, "measured": "outputs"},
    },
    "expert_tokens": {"1": [3, 4]},
    "fallbacks": ["x: no tokens"],
    "calibration": {"sources": [{"origin": "a.jsonl"}]},
}


def test_errors_are_folded_by_class_and_layer(tmp_path):
    (tmp_path / "klquant.json").write_text(json.dumps(PROVENANCE))
    q = quantization(tmp_path, CONFIG)
    rows = [(e.tensor_class, e.layer, e.measured, e.tensors, e.max_error) for e in q.errors]
    assert rows == [
        ("routed_experts", 1, "outputs", 2, 0.3), ("routed_experts", 2, "weights", 1, 0.5),
        ("head", None, "outputs", 1, 0.01),
    ]  # fmt: skip
    assert q.errors[0].mean_error == pytest.approx(0.2)
    assert (q.recipe, q.expert_tokens, q.fallbacks) == ("int4", {1: [3, 4]}, ["x: no tokens"])
    assert calibrated_on(tmp_path) == {"a.jsonl"}


def test_a_checkpoint_of_another_tool_has_none(tmp_path):
    assert quantization(tmp_path, CONFIG) is None and calibrated_on(tmp_path) == set()


@pytest.mark.parametrize("change", [{"tensors": 1}, {"recipe": None}, {"tensors": {"x": {}}}, {"expert_tokens": []}])
def test_an_unknown_form_is_named(tmp_path, change):
    (tmp_path / "klquant.json").write_text(json.dumps(PROVENANCE | change))
    with pytest.raises(UserError, match=r"klquant\.json: not as klquant quantize writes it"):
        quantization(tmp_path, CONFIG)


@pytest.mark.parametrize("calibration", [1, {"sources": 1}, {"sources": [{}]}, {"sources": ["a.jsonl"]}])
def test_calibration_text_of_an_unknown_form_is_named(tmp_path, calibration):
    (tmp_path / "klquant.json").write_text(json.dumps(PROVENANCE | {"calibration": calibration}))
    with pytest.raises(UserError, match=r"klquant\.json: not as klquant quantize writes it"):
        calibrated_on(tmp_path)
