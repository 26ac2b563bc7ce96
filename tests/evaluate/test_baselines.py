"""Baselines: values and bytes are those of bitsandbytes' own functions, and of `klquant quantize` for rounding."""

import json
import sys

import pytest
import torch

from klquant.checkpoint.quantized import QuantizedReader
from klquant.core.spec import WeightSpec
from klquant.errors import UserError
from klquant.evaluate.baselines import BaselineModel, baselines, bitsandbytes, plan_for, rounding, stored_bytes
from klquant.evaluate.result import load_result
from klquant.evaluate.run import evaluate
from klquant.evaluate.source import DeviceSource
from tests.checkpoint.build import quantized_checkpoint
from tests.pipeline.build import ROUND, recipe, run, short_model
from tests.tiny import tiny_config

CPU = torch.device("cpu")
SHAPES = [(64, 64), (7, 33), (100, 96), (3, 4096), (1, 1)]
SPEC = WeightSpec(bits=4, group_size=32)


@pytest.fixture(scope="module")
def bnb():
    return pytest.importorskip("bitsandbytes", reason="bitsandbytes (the extra `bnb`) is not installed")


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    return QuantizedReader.open(short_model(tmp_path_factory.mktemp("short") / "model"))


def matrix(shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_nf4_is_what_a_linear4bit_stores(bnb, shape, double):
    """Its codes and absmaxes, decoded here: its own decoding on CPUs is right for whole blocks in a row only."""
    method, w = "nf4-double" if double else "nf4", matrix(shape)
    stored = bnb.nn.Params4bit(w.clone(), compress_statistics=double, quant_type="nf4").to("cpu")
    state, absmax = stored.quant_state, stored.quant_state.absmax
    assert state.nested == double and state.blocksize == 64
    if double:
        nested = state.state2
        absmax = nested.code[absmax.long()] * nested.absmax.repeat_interleave(256)[: len(absmax)] + state.offset
    packed = stored.data.flatten().long()
    codes = torch.stack((packed >> 4, packed & 15), 1).flatten()[: w.numel()]
    values = (state.code[codes] * absmax.repeat_interleave(64)[: w.numel()]).view(shape)
    ours = rounding(method, {})("x.weight", w)
    assert ours.dtype == w.dtype
    torch.testing.assert_close(ours, values.bfloat16(), rtol=2**-7, atol=0)
    if shape[1] % 64 == 0:
        assert torch.equal(ours, bnb.functional.dequantize_4bit(stored.data, state))
    tensors = {name: t for name, t in state.as_dict(packed=True).items() if "bitsandbytes__" not in name}
    assert stored_bytes(method, shape, SPEC) == stored.data.nbytes + sum(t.nbytes for t in tensors.values())


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_is_what_a_linear8bit_stores(bnb, shape):
    w = matrix(shape)
    layer = bnb.nn.Linear8bitLt(shape[1], shape[0], bias=False, has_fp16_weights=False)
    layer.load_state_dict({"weight": w.half()})
    stored = layer.to("cpu").weight
    codes, absmax = (stored.CB, stored.SCB) if stored.CB is not None else bnb.functional.int8_vectorwise_quant(
        w.half())[:2]  # fmt: skip
    torch.testing.assert_close(rounding("int8", {})("x.weight", w), codes * absmax[:, None] / 127, rtol=1e-6, atol=0)
    by_hand = (w.half().float() * 127 / absmax[:, None]).round()
    assert (codes - by_hand).abs().max() <= 1 and (codes != by_hand).float().mean() < 0.01
    assert stored_bytes("int8", shape, SPEC) == codes.nbytes + absmax.nbytes


def test_rounding_is_what_quantize_does_without_calibration(reader, texts, options, tmp_path):
    """A baseline of the calibrated recipe = a checkpoint of the recipe that rounds."""
    model = reader.files.folder
    run(model, tmp_path / "rounded", recipe(ROUND))
    made = evaluate(tmp_path / "rounded", model, tmp_path / "made.json", options)
    baseline = BaselineModel(reader, plan_for(reader, recipe()), "rtn")
    judged = evaluate(model, None, tmp_path / "r.json", options, baseline=baseline)
    assert judged.overall == made.overall and judged.layers == made.layers
    assert judged.model.size.bits == made.model.size.bits and judged.model.size.memory == made.model.size.memory
    infos = QuantizedReader.open(tmp_path / "rounded").files.tensors
    assert judged.model.size.disk == sum(info.nbytes for info in infos.values())
    assert judged.model.size.tensors == judged.model.size.disk == made.model.size.tensors < made.model.size.disk
    assert judged.model.scheme == made.model.scheme
    assert judged.reference == made.reference and judged.quantization is None
    assert load_result(tmp_path / "r.json") == judged


@pytest.mark.parametrize("method", ["rtn", "nf4", "nf4-double", "int8"])
def test_the_recipes_tensors_are_rounded_and_no_others(bnb, reader, method):
    plan = plan_for(reader, recipe())
    ours, base = BaselineModel(reader, plan, method).source(CPU), DeviceSource(reader, CPU)
    for d in plan.decisions:
        a, b = (source.weight(d.key.name, torch.float32) for source in (ours, base))
        assert torch.equal(a, b) == (d.spec is None), d.key.name
        assert (a - b).norm() <= 0.15 * b.norm(), d.key.name


def test_a_result_says_what_it_is(bnb, reader, options, tmp_path):
    baseline = BaselineModel(reader, plan_for(reader, recipe()), "int8")
    result = evaluate(reader.files.folder, None, tmp_path / "r.json", options, baseline=baseline)
    made = result.model.baseline
    assert (made.method, made.title, made.recipe) == ("int8", "LLM.int8 (bnb)", "small")
    assert made.library == f"bitsandbytes {bnb.__version__}"
    assert any("activations" in note for note in result.notes)
    assert result.model.scheme["INT8 row"] == len(baseline.specs) > 0 and result.overall.kld.mean > 0
    assert 8 < result.model.size.bits.routed_experts < 9.1


def test_of_each_method_only_what_differs(bnb, reader):
    other = recipe(ROUND.replace("bits: 4", "bits: 3"))
    three = recipe().model_copy(update={"rules": tuple(
        rule.model_copy(update={"weights": rule.weights.model_copy(update={"bits": 3})})
        if rule.weights.bits == 4 else rule for rule in recipe().rules)})  # fmt: skip
    calibrated, rounded, fewer = (plan_for(reader, r) for r in (recipe(), other, three))
    assert [b.method for b in baselines(reader, [calibrated, rounded], ["nf4", "rtn"])] == ["nf4", "rtn"]
    assert baselines(reader, [rounded], ["rtn"]) == []
    assert baselines(reader, [rounded, fewer], ["rtn"]) == [], "that recipe's own checkpoint is it"
    assert len({b.fingerprint for b in baselines(reader, [calibrated, fewer], ["rtn", "nf4", "int8"])}) == 4


def test_a_quantized_model_has_no_baselines(tmp_path):
    quantized_checkpoint(tmp_path / "int4", tiny_config())
    with pytest.raises(UserError, match="is quantized already; give the 16-bit one"):
        plan_for(QuantizedReader.open(tmp_path / "int4"), recipe())


def test_without_bitsandbytes_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"pip install 'klquant\[bnb\]'"):
        bitsandbytes()


def test_results_from_before_baselines_are_read(result, tmp_path):
    raw = result.model_dump(mode="json")
    del raw["model"]["baseline"], raw["reference"]["checkpoint"]["baseline"]
    (tmp_path / "r.json").write_text(json.dumps(raw))
    assert load_result(tmp_path / "r.json") == result
