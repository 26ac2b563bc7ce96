"""quantization_config: few patterns, right for every engine's spelling, read back as written."""

import random

import pytest
import torch

from klquant.checkpoint.config import KimiLinearConfig
from klquant.checkpoint.index import read_json
from klquant.checkpoint.names import TensorClass
from klquant.checkpoint.patterns import check_quantization_config, quantization_config
from klquant.checkpoint.scheme import Schemes, linear_modules
from klquant.core.spec import WHOLE_ROW, WeightSpec
from tests.checkpoint.build import INT4, INT8, assign, int4_rule
from tests.tiny import tiny_config

CONFIG = KimiLinearConfig.from_dict(tiny_config())
INT3 = WeightSpec(bits=3, group_size=32)
GATES = TensorClass.KDA_GATES


def everything_int8(key):
    return INT8 if int4_rule(key) else None


def by_layer(key):
    return {1: INT3, 2: None, 3: INT4}[key.layer] if key.cls == TensorClass.ROUTED_EXPERTS else int4_rule(key)


def by_role(key):
    if key.cls == TensorClass.ROUTED_EXPERTS and key.layer == 2:
        return INT8 if key.role == "w2" else INT3
    return int4_rule(key)


def attention_differs(key):
    """KDA and MLA share the names q_proj and o_proj; only the layer tells them apart."""
    return INT4 if key.cls == TensorClass.MLA_PROJ else int4_rule(key)


def gates_too(key):
    return INT8 if key.cls in (GATES, TensorClass.MLA_KV_B, TensorClass.ROUTER) else int4_rule(key)


def gates_of_one_layer(key):
    return INT8 if key.cls == GATES and key.layer == 1 else int4_rule(key)


def half_a_fused_linear(key):
    return None if key.role == "gate_proj" and key.layer in (0, 1) else int4_rule(key)


def rows(key):
    spec = int4_rule(key)
    return spec and WeightSpec(bits=spec.bits, group_size=WHOLE_ROW, symmetric=False)


RULES = [
    int4_rule, everything_int8, by_layer, by_role, attention_differs, gates_too, gates_of_one_layer,
    half_a_fused_linear, rows,
]  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
def test_every_module_reads_back_as_assigned(rule):
    assignments, kept = assign(CONFIG, rule)
    raw = quantization_config(assignments, kept, CONFIG)  # runs check_quantization_config
    schemes = Schemes.from_config(raw, "config.json")
    for module, is_linear in linear_modules(CONFIG).items():
        assert schemes.spec(module, is_linear) == assignments.get(module)
    assert len(raw["config_groups"]) == len(set(assignments.values()))


def test_random_assignments():
    rng = random.Random(0)
    for _ in range(30):
        table = {}
        assignments, kept = assign(
            CONFIG,
            lambda key, table=table: table.setdefault((key.layer, key.role), rng.choice([None, INT3, INT4, INT8])),
        )
        quantization_config(assignments, kept, CONFIG)


def test_the_default_recipe_in_full():
    assignments, kept = assign(CONFIG, int4_rule)
    weights = {"type": "int", "symmetric": True, "strategy": "group", "group_size": 32, "dynamic": False}
    rest = {"input_activations": None, "output_activations": None, "format": "pack-quantized"}
    assert quantization_config(assignments, kept, CONFIG) == {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "ignore": [
            r"re:.*\.self_attn\.(?:(?:forget_gate\.)?f_a_proj|(?:forget_gate\.)?f_b_proj|g_a_proj|g_b_proj|b_proj"
            r"|kv_b_proj)$",
            r"re:.*\.(?:block_sparse_moe|mlp)\.gate$",
        ],
        "config_groups": {
            "group_0": {
                "targets": [r"re:.*\.block_sparse_moe\.experts\..*"],
                "weights": {"num_bits": 4} | weights,
            }
            | rest,
            "group_1": {
                "targets": [
                    r"re:.*\.self_attn\.(?:q_proj|k_proj|v_proj|o_proj|kv_a_proj_with_mqa)$",
                    r"re:.*\.mlp\.(?:gate_proj|up_proj|down_proj|gate_up_proj)$",
                    r"re:.*\.(?:block_sparse_moe|mlp)\.shared_expert[s]\.(?:gate_proj|up_proj|down_proj|gate_up_proj)$",
                    "lm_head",
                ],
                "weights": {"num_bits": 8} | weights,
            }
            | rest,
        },
    }


def test_the_48b_needs_as_few_patterns(kimi_48b):
    config = KimiLinearConfig.from_dict(read_json(kimi_48b / "config.json"))
    assignments, kept = assign(config, int4_rule)
    raw = quantization_config(assignments, kept, config)
    assert len(raw["ignore"]) == 2
    assert [len(group["targets"]) for group in raw["config_groups"].values()] == [1, 4]


def test_rows_are_channels():
    assignments, kept = assign(CONFIG, rows)
    weights = quantization_config(assignments, kept, CONFIG)["config_groups"]["group_0"]["weights"]
    assert weights == {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "channel", "dynamic": False}


# How vLLM looks modules up: fused linears by their own name, experts as gate, up and down of expert 0.
VLLM = {
    "model.layers.0.mlp.gate_up_proj": INT8,
    "model.layers.0.mlp.down_proj": INT8,
    "model.layers.1.block_sparse_moe.shared_experts.gate_up_proj": INT8,
    "model.layers.1.block_sparse_moe.experts.0.gate_proj": INT4,
    "model.layers.1.block_sparse_moe.experts.0.up_proj": INT4,
    "model.layers.1.block_sparse_moe.experts.0.down_proj": INT4,
    "model.layers.1.block_sparse_moe.gate": None,
    "model.layers.3.self_attn.kv_b_proj": None,
    "lm_head": INT8,
}
TRANSFORMERS = {
    "model.layers.0.self_attn.forget_gate.f_a_proj": None,
    "model.layers.1.mlp.shared_experts.gate_proj": INT8,
    "model.layers.1.mlp.gate": None,
    "model.layers.0.mlp.up_proj": INT8,
    "model.layers.3.self_attn.kv_a_proj_with_mqa": INT8,
}


@pytest.mark.parametrize("name", [*VLLM, *TRANSFORMERS])
def test_the_spellings_of_other_engines(name):
    from compressed_tensors.utils.match import is_match

    assignments, kept = assign(CONFIG, int4_rule)
    raw = quantization_config(assignments, kept, CONFIG)
    want = (VLLM | TRANSFORMERS)[name]
    linear = torch.nn.Linear(1, 1, device="meta")
    bits = [g["weights"]["num_bits"] for g in raw["config_groups"].values() if is_match(name, linear, g["targets"])]
    assert bits == ([] if want is None else [want.bits])
    assert is_match(name, linear, raw["ignore"]) == (want is None)


def test_a_fused_linear_has_the_scheme_of_its_parts_or_none():
    def fused(rule, name):
        assignments, kept = assign(CONFIG, rule)
        schemes = Schemes.from_config(quantization_config(assignments, kept, CONFIG), "config.json")
        return schemes.spec(name), any(p for p in schemes.ignore if Schemes({}, {p: "g"}, ()).group(name))

    kda = "model.layers.1.self_attn.in_proj_qkvgfab"
    assert fused(gates_too, kda) == (INT8, False)
    assert fused(lambda key: INT4 if key.cls == TensorClass.ROUTED_EXPERTS else None, kda) == (None, True)
    assert fused(int4_rule, kda) == (None, False)  # mixed: vLLM 0.33 refuses it, and the recipe's target rules say so
    assert fused(half_a_fused_linear, "model.layers.0.mlp.gate_up_proj") == (None, False)
    assert fused(half_a_fused_linear, "model.layers.2.block_sparse_moe.shared_experts.gate_up_proj") == (INT8, False)


def test_transformers_finds_the_group_of_the_experts_and_the_other_one():
    """It goes by the letters "experts" in a regex: the routed experts' group must be the first that has them, and the
    group of the dense linears must not have them."""
    assignments, kept = assign(CONFIG, int4_rule)
    groups = list(quantization_config(assignments, kept, CONFIG)["config_groups"].values())
    assert [any("experts" in target for target in group["targets"]) for group in groups] == [True, False]


def test_experts_of_a_layer_must_agree():
    assignments, kept = assign(CONFIG, lambda key: INT8 if key.expert == 3 else int4_rule(key))
    with pytest.raises(AssertionError, match="must share one spec"):
        quantization_config(assignments, kept, CONFIG)


def test_every_linear_must_be_assigned_or_kept():
    assignments, kept = assign(CONFIG, int4_rule)
    with pytest.raises(AssertionError, match="kv_b_proj"):
        quantization_config(assignments, [name for name in kept if "kv_b" not in name], CONFIG)


@pytest.mark.parametrize("change", ["wider", "narrower", "overlap", "ignored", "not ignored", "bits"])
def test_the_check_finds_a_wrong_config(change):
    assignments, kept = assign(CONFIG, int4_rule)
    raw = quantization_config(assignments, kept, CONFIG)
    experts, rest = raw["config_groups"]["group_0"], raw["config_groups"]["group_1"]
    match change:
        case "wider":
            rest["targets"].append(r"re:.*\.kv_b_proj$")
        case "narrower":
            experts["targets"] = [r"re:.*experts\.\d+\.w[123]$"]  # vLLM would leave the experts in BF16
        case "overlap":
            rest["targets"].append(r"re:.*experts\..*\.w2$")
        case "ignored":
            raw["ignore"].append("lm_head")
        case "not ignored":
            raw["ignore"].pop()
        case "bits":
            experts["weights"]["num_bits"] = 3
    with pytest.raises(AssertionError):
        check_quantization_config(raw, assignments, kept, CONFIG)


def test_matching_is_that_of_compressed_tensors():
    """Random targets and ignore lists, overlapping at will: the same group for every module."""
    from compressed_tensors.utils.match import is_match, match_targets

    rng = random.Random(1)
    modules = list(linear_modules(CONFIG))
    patterns = [
        "Linear", "Module", "Conv1d", "lm_head", r"re:.*q_proj$", r"re:.*self_attn.*", r"re:.*experts\..*", "re:model",
        r"re:.*layers\.[13]\.", r"re:gate", r"re:.*gate", *rng.sample(modules, 8),
    ]  # fmt: skip
    linear = torch.nn.Linear(1, 1, device="meta")
    for _ in range(300):
        targets = rng.sample(patterns, rng.randint(1, 5))
        ignore = rng.sample(patterns, rng.randint(0, 4))
        groups = {
            f"g{i}": {"targets": [target], "format": "pack-quantized", "weights": {"num_bits": 4, "group_size": 32}}
            for i, target in enumerate(targets)
        }
        raw = {"quant_method": "compressed-tensors", "config_groups": groups, "ignore": ignore}
        schemes = Schemes.from_config(raw, "config.json")
        for module in rng.sample(modules, 20):
            matched = [] if is_match(module, linear, ignore) else match_targets(module, linear, targets)
            want = f"g{targets.index(matched[0])}" if matched else None
            assert schemes.group(module) == want, (module, targets, ignore)
