"""What a plan accepts, a run finishes: every role that can be quantized, alone and in odd company."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from klquant.checkpoint.config import KimiLinearConfig
from klquant.checkpoint.names import SENSITIVE, expected_tensors, parse_name
from klquant.checkpoint.quantized import QuantizedReader
from klquant.checkpoint.reader import CheckpointReader
from klquant.checkpoint.verify import verify
from klquant.errors import UserError
from klquant.model.forward import Model
from tests.pipeline.build import recipe, run, short_model
from tests.tiny import tiny_config

TEXT = "calibration: {mix: tiny, tokens: 64, window: 32, min_expert_tokens: 0, max_tokens: 64}"
HEAD = "\n  - {tensors: head, weights: {bits: 8, group_size: 32}, algorithm: gptq, why: w}\n"


def rule(cls, roles, algorithm):
    allow = "allow_sensitive: true, " if cls in SENSITIVE else ""
    grid = f"weights: {{bits: 8, group_size: 32}}, algorithm: {algorithm}"
    return f"\n  - {{tensors: {cls}, roles: [{', '.join(roles)}], {grid}, {allow}why: w}}"


def matrices():
    config = KimiLinearConfig.from_dict(tiny_config())
    keys = (parse_name(name, config) for name in expected_tensors(config))
    return sorted({(key.cls, key.role) for key in keys if key.is_matrix})


def logits(source):
    ids = torch.randint(3, 259, (2, 33), generator=torch.Generator().manual_seed(0))
    return Model.load(source, torch.float32, "cpu").logits(ids)


@pytest.fixture(scope="module")
def exact(model):
    return logits(CheckpointReader.open(model))


def check(model, exact, out, rules):
    """The run ends in a whole checkpoint that computes nearly what the model does: at 8 bits nothing is far off."""
    run(model, out, recipe(rules, TEXT, gptq="refine_rounds: 1"))
    assert verify(out) == []
    assert (logits(QuantizedReader.open(out)) - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("algorithm", ["rtn", "gptq", "awq"])
@pytest.mark.parametrize(("cls", "role"), matrices())
def test_one_role_alone(model, exact, tmp_path, cls, role, algorithm):
    try:
        check(model, exact, tmp_path / "out", rule(cls, [role], algorithm) + (HEAD if cls != "head" else "\n"))
    except UserError as error:
        assert algorithm != "rtn" and role in ("kv_b_proj", "f_b_proj", "g_b_proj")
        assert str(error).startswith("small.yaml:") and f"{cls} {role}" in str(error) and "\n" not in str(error)


COMPANY = {
    "the sensitive rounded, AWQ around them": [
        ("mla_kv_b", ["kv_b_proj"], "rtn"), ("kda_gates", ["f_b_proj", "g_b_proj"], "rtn"), ("router", ["gate"], "rtn"),
        ("kda_proj", ["q_proj", "o_proj"], "awq"), ("mla_proj", ["o_proj"], "awq"), ("routed_experts", ["w1"], "awq"),
    ],
    "AWQ folds into kept experts": [("routed_experts", ["w1", "w2"], "awq")],
    "AWQ folds into experts on a grid": [("routed_experts", ["w1", "w3"], "gptq"), ("routed_experts", ["w2"], "awq")],
    "router and shared expert as one": [
        ("router", ["gate"], "gptq"), ("shared_experts", ["gate_proj", "up_proj", "down_proj"], "gptq"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("rules", COMPANY.values(), ids=COMPANY.keys())
def test_roles_in_company(model, exact, tmp_path, rules):
    check(model, exact, tmp_path / "out", "".join(rule(*r) for r in rules) + HEAD)


def test_a_matrix_of_zeros_has_no_error(tmp_path):
    """GPTQ's correction of its target makes it other than zero; an error relative to nothing would drown all others."""
    folder = short_model(tmp_path / "model")
    name = "model.layers.1.self_attn.o_proj"
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if f"{name}.weight" in tensors:
            tensors[f"{name}.weight"].zero_()
            save_file(tensors, path, metadata={"format": "pt"})
    made = run(folder, tmp_path / "out", recipe())
    assert made["tensors"][name]["error"] == 0
    assert verify(tmp_path / "out") == []
