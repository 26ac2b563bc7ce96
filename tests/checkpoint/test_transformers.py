"""transformers loads what klquant writes: the same weights, hence the same logits, bit for bit."""

import pytest
import torch

from klquant.checkpoint.names import TensorClass
from klquant.core.spec import WHOLE_ROW, WeightSpec
from tests.checkpoint.build import INT4, INT8, int4_rule, quantized_checkpoint
from tests.model.oracle import oracle
from tests.tiny import tiny_config, write_checkpoint


@pytest.fixture
def mapping():
    """transformers 5.23 cannot load a packed Kimi-Linear checkpoint as it stands: it prepends its dequantization to
    every conversion of `*.weight`, which for the three convolutions (never packed) yields nothing to concatenate. A
    source pattern that ends in `weight$` matches the same tensors and is left alone."""
    from transformers import conversion_mapping as mappings
    from transformers.core_model_loading import WeightConverter

    before = mappings.get_checkpoint_conversion_mapping("kimi_linear")
    after = []
    for entry in before:
        sources = entry.source_patterns
        if isinstance(entry, WeightConverter) and "conv1d" in sources[0]:
            entry = WeightConverter([f"{source}$" for source in sources], entry.target_patterns, entry.operations)
        after.append(entry)
    mappings.register_checkpoint_conversion_mapping("kimi_linear", after, overwrite=True)
    yield
    mappings.register_checkpoint_conversion_mapping("kimi_linear", before, overwrite=True)


def experts_only(key):
    return INT4 if key.cls == TensorClass.ROUTED_EXPERTS else None


def int3_and_rows(key):
    spec = int4_rule(key)
    return spec and (WeightSpec(bits=3, group_size=32) if spec == INT4 else WeightSpec(bits=8, group_size=WHOLE_ROW))


def two_dense_schemes(key):
    return WeightSpec(bits=4, group_size=64) if key.cls == TensorClass.KDA_PROJ else int4_rule(key)


def int8(key):
    return INT8 if int4_rule(key) else None


def gates_too(key):
    return INT8 if key.cls == TensorClass.KDA_GATES else int4_rule(key)


@pytest.mark.parametrize("rule", [int4_rule, experts_only, int3_and_rows, two_dense_schemes, int8, gates_too])
def test_logits_are_those_of_the_dequantized_weights(tmp_path, mapping, rule):
    raw = tiny_config()
    plain = quantized_checkpoint(tmp_path / "quantized", raw, rule)
    write_checkpoint(tmp_path / "plain", raw, plain)
    ids = torch.randint(3, 259, (2, 70), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = oracle(tmp_path / "plain", torch.bfloat16)(ids).logits
        theirs = oracle(tmp_path / "quantized", torch.bfloat16)(ids).logits
    assert ours.isfinite().all() and ours.std() > 0.1
    assert torch.equal(ours, theirs)


def test_dequantizing_at_load(tmp_path, mapping):
    """`dequantize=True` takes the first group without "experts" for all dense linears: the default recipe has one."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    plain = quantized_checkpoint(tmp_path / "m", tiny_config())
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", dtype=torch.bfloat16, quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    weights = dict(model.named_parameters())
    for name, module in (("mlp.down_proj", "layers.0.mlp.down_proj"), ("q", "layers.3.self_attn.q_proj")):
        assert torch.equal(weights[f"model.{module}.weight"], plain[f"model.{module}.weight"]), name
    for layer in (1, 2, 3):
        w2 = [plain[f"model.layers.{layer}.block_sparse_moe.experts.{e}.w2.weight"] for e in range(8)]
        assert torch.equal(weights[f"model.layers.{layer}.mlp.experts.down_proj"], torch.stack(w2))
        shared = "shared_experts.up_proj.weight"
        assert torch.equal(
            weights[f"model.layers.{layer}.mlp.{shared}"], plain[f"model.layers.{layer}.block_sparse_moe.{shared}"]
        )
