"""The packed layout against compressed-tensors' own compressor, and reading quantized checkpoints."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from klquant.checkpoint.index import INDEX
from klquant.checkpoint.names import TensorClass
from klquant.checkpoint.quantized import QuantizedReader, compress, decompress, packed_layout
from klquant.checkpoint.scheme import linear_modules
from klquant.core.spec import WHOLE_ROW, WeightSpec
from klquant.errors import UserError
from tests.checkpoint.build import INT4, INT8, edit_json, int4_rule, quantized_checkpoint, round_to_grid
from tests.tiny import tiny_config, tiny_tensors

EXPERT = "model.layers.1.block_sparse_moe.experts.3.w1"
SPECS = [
    WeightSpec(bits=bits, group_size=group, symmetric=symmetric)
    for bits in (3, 4, 8)
    for group in (32, 64, 128, WHOLE_ROW)
    for symmetric in (True, False)
]


def their_scheme(spec):
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    group = {"strategy": "channel"} if spec.group_size == WHOLE_ROW else {"group_size": spec.group_size}
    args = QuantizationArgs(num_bits=spec.bits, type="int", symmetric=spec.symmetric, **group)
    return QuantizationScheme(targets=["Linear"], weights=args)


@pytest.mark.parametrize("n", [1, 7, 32, 50])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_both_directions_against_compressed_tensors(spec, n):
    from compressed_tensors.compressors import PackedQuantizationCompressor as Theirs

    k = 100 if spec.group_size == WHOLE_ROW else 256
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(n)).bfloat16()
    ours = round_to_grid(w, spec)
    stored = compress("m", ours)
    scheme = their_scheme(spec)

    # their compressor, given our values and grid, makes our tensors
    qdq = {"weight": ours.decode(torch.float32), "weight_scale": ours.scale.float()}
    if ours.zero is not None:
        qdq["weight_zero_point"] = ours.zero
    theirs = Theirs.compress(qdq, scheme) | {"weight_scale": ours.scale}
    assert {f"m.{name}" for name in theirs} == set(stored)
    for name, tensor in theirs.items():
        mine = stored[f"m.{name}"]
        assert mine.dtype == tensor.dtype and mine.shape == tensor.shape and mine.is_contiguous()
        assert torch.equal(mine, tensor), name

    # they unpack ours to our values, and we unpack ours to our codes
    local = {name.removeprefix("m."): tensor for name, tensor in stored.items()}
    value = Theirs.decompress(local, scheme)["weight"]
    assert value.dtype == torch.bfloat16 and torch.equal(value, ours.decode(torch.bfloat16))
    for tensors in (stored, local):
        back = decompress(tensors, spec)
        assert torch.equal(back.codes, ours.codes) and torch.equal(back.scale, ours.scale) and back.spec == spec
        assert (back.zero is None) == spec.symmetric
        assert back.zero is None or torch.equal(back.zero, ours.zero)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_layout_is_known_beforehand(spec):
    stored = compress("m", round_to_grid(torch.randn(50, 256), spec))
    names = {torch.int32: "I32", torch.int64: "I64", torch.bfloat16: "BF16"}
    assert packed_layout("m", (50, 256), spec) == {n: (names[t.dtype], tuple(t.shape)) for n, t in stored.items()}


def test_a_group_that_does_not_divide_is_refused_by_name():
    with pytest.raises(UserError, match=r"m: 100 input features .* group size 64"):
        packed_layout("m", (4, 100), WeightSpec(bits=4, group_size=64))


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized") / "model"
    return folder, quantized_checkpoint(folder, tiny_config())


@pytest.fixture
def folder(quantized, tmp_path):
    """A copy of the quantized checkpoint to damage."""
    return shutil.copytree(quantized[0], tmp_path / "model")


def test_ours_is_a_source_of_weights(quantized):
    folder, plain = quantized
    reader = QuantizedReader.open(folder)
    reader.check_complete()
    assert reader.config.num_experts == 8
    for name, tensor in plain.items():
        for dtype in (torch.bfloat16, torch.float32):
            assert torch.equal(reader.weight(name, dtype), tensor.to(dtype)), name


def test_specs(quantized):
    reader = QuantizedReader.open(quantized[0])
    assert reader.spec(EXPERT) == INT4 and reader.spec("lm_head") == INT8
    assert reader.spec("model.layers.3.self_attn.kv_b_proj") is None
    assert reader.spec("model.layers.1.block_sparse_moe.gate") is None
    assert reader.spec("model.embed_tokens") is None
    assert reader.quantized(EXPERT).spec == INT4


def test_a_16_bit_checkpoint_is_one_too(tiny):
    reader = QuantizedReader.open(tiny)
    reader.check_complete()
    assert set(reader.specs.values()) == {None}
    for name, tensor in tiny_tensors(tiny_config()).items():
        assert torch.equal(reader.weight(name, torch.float32), tensor.float())


def other_tools(raw):
    """Configs as other quantizers write them for `int4_rule`: class targets with an ignore list, presets' leftovers."""
    weights = {"type": "int", "symmetric": True, "dynamic": False, "observer": "mse", "observer_kwargs": {}}
    kept = [name for name, _ in linear_modules_of(raw) if ".self_attn." in name or name == "lm_head"]
    experts = weights | {
        "num_bits": 4,
        "strategy": "group",
        "group_size": 32,
        "actorder": None,
        "block_structure": None,
    }
    common = {"quant_method": "compressed-tensors", "format": "pack-quantized", "version": "0.12.2"}
    return {
        "experts only, class target, names ignored": common
        | {
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": experts, "input_activations": None}},
            "ignore": [*kept, "re:.*shared_experts.*", r"re:.*\.mlp\..*", r"re:.*block_sparse_moe\.gate$"],
        },
        "the same, router not listed as it is no Linear": common
        | {
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": experts}},
            "ignore": [*kept, "re:.*shared_experts.*", r"re:.*\.mlp\..*"],
        },
        "strategy inferred, format by group": {
            "quant_method": "compressed-tensors", "format": "mixed-precision", "ignore": None,
            "config_groups": {
                "experts": {
                    "targets": [r"re:.*experts\.\d+\.w[123]$"], "format": "pack-quantized",
                    "weights": {"num_bits": 4, "group_size": 32},
                }
            },
        },
    }  # fmt: skip


def linear_modules_of(raw):
    from klquant.checkpoint.config import KimiLinearConfig

    return linear_modules(KimiLinearConfig.from_dict(raw)).items()


@pytest.mark.parametrize("style", list(other_tools(tiny_config())))
def test_other_tools_checkpoints(tmp_path, style):
    raw = tiny_config()
    plain = quantized_checkpoint(
        tmp_path / "m", raw, lambda key: INT4 if key.cls == TensorClass.ROUTED_EXPERTS else None
    )
    edit_json(tmp_path / "m/config.json", lambda c: c.update(quantization_config=other_tools(raw)[style]))
    reader = QuantizedReader.open(tmp_path / "m")
    reader.check_complete()
    for name, tensor in plain.items():
        assert torch.equal(reader.weight(name, tensor.dtype), tensor)


def test_fp16_scales_of_other_tools(folder):
    name = f"{EXPERT}.weight_scale"
    change_tensor(folder, name, lambda scale: scale.half())
    reader = QuantizedReader.open(folder)
    reader.check_complete()
    weight = reader.quantized(EXPERT)
    assert weight.scale.dtype == torch.float16
    assert torch.equal(reader.weight(f"{EXPERT}.weight", torch.float32), weight.decode(torch.float16).float())


def change_tensor(folder, name, change):
    path = folder / QuantizedReader.open(folder).files.tensors[name].shard.name
    tensors = load_file(path)
    tensors[name] = change(tensors[name])
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"format": "int-quantized"}, "group group_0: format 'int-quantized' is not supported"),
        (
            {"weights": {"num_bits": 4, "type": "float", "group_size": 32}},
            "group group_0: weights of type 'float' are not supported",
        ),
        ({"weights": {"num_bits": 5, "group_size": 32}}, "group group_0: 5 bits .* not supported"),
        ({"weights": {"num_bits": 4, "group_size": 16}}, "group group_0: 4 bits with group size 16"),
        ({"weights": {"num_bits": 4, "strategy": "tensor"}}, "group group_0: strategy 'tensor' is not supported"),
        ({"weights": {"num_bits": 4, "group_size": 32, "actorder": "group"}}, "group group_0: actorder 'group'"),
        ({"weights": {"num_bits": 4, "group_size": 32, "dynamic": True}}, "group group_0: quantized activations"),
        ({"input_activations": {"num_bits": 8}}, "group group_0: quantized activations are not supported"),
        ({"output_activations": {"num_bits": 8}}, "group group_0: quantized activations are not supported"),
        ({"targets": []}, "group group_0: targets is not a list"),
        ({"targets": [1]}, "group group_0: targets is not a list"),
        ({"targets": ["re:("]}, r"'re:\(' is not a pattern"),
        ({"weights": None}, "group group_0: "),
    ],
)
def test_a_scheme_that_klquant_cannot_read(folder, change, match):
    edit_json(folder / "config.json", lambda c: c["quantization_config"]["config_groups"]["group_0"].update(change))
    with pytest.raises(UserError, match=match):
        QuantizedReader.open(folder)


@pytest.mark.parametrize(
    ("value", "match"),
    [
        ([], "quant_method None is not"),
        ({"quant_method": "gptq"}, "quant_method 'gptq' is not"),
        (
            {"quant_method": "compressed-tensors", "transform_config": {"config_groups": {"R4": {}}}},
            "transform_config .* is not supported",
        ),
        ({"quant_method": "compressed-tensors"}, "config_groups is missing"),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, "config_groups is missing"),
        ({"quant_method": "compressed-tensors", "config_groups": ["W4A16"]}, "config_groups is missing"),
        ({"quant_method": "compressed-tensors", "config_groups": {"W4A16": ["Linear"]}}, "group W4A16: targets"),
        ({"quant_method": "compressed-tensors", "config_groups": {"g": {}}, "ignore": "x"}, "ignore is not a list"),
    ],
)
def test_another_quantization(folder, value, match):
    edit_json(folder / "config.json", lambda c: c.update(quantization_config=value))
    with pytest.raises(UserError, match=rf"config\.json: quantization_config: .*{match}"):
        QuantizedReader.open(folder)


def test_config_and_tensors_disagree(folder):
    edit_json(folder / "config.json", lambda c: c["quantization_config"]["ignore"].append("lm_head"))
    with pytest.raises(UserError, match=r"tensor lm_head\.weight is missing \(and 3 more"):
        QuantizedReader.open(folder).check_complete()


def test_a_packed_tensor_of_another_width_is_refused(folder):
    def wider(c):
        group = next(g for g in c["quantization_config"]["config_groups"].values() if g["weights"]["num_bits"] == 4)
        group["weights"]["num_bits"] = 3

    edit_json(folder / "config.json", wider)
    reader = QuantizedReader.open(folder)
    with pytest.raises(UserError, match=r"experts\.0\.w1\.weight_packed has shape \[32, 8\], .* \[32, 6\]"):
        reader.check_complete()
    with pytest.raises(UserError, match=rf"{EXPERT}\.weight_packed has shape"):
        reader.quantized(EXPERT)


@pytest.mark.parametrize(
    ("part", "change", "match"),
    [
        ("weight_scale", lambda t: t * float("nan"), "holds NaN or infinite"),
        ("weight_scale", lambda t: t * 0, "holds a scale that is not positive"),
        ("weight_scale", lambda t: -t, "holds a scale that is not positive"),
        ("weight_shape", lambda t: t * 1_000_000, r"says \[32000000, 64000000\], but config\.json implies \[32, 64\]"),
    ],
)
def test_damaged_values(folder, part, change, match):
    change_tensor(folder, f"{EXPERT}.{part}", change)
    with pytest.raises(UserError, match=rf"{EXPERT}\.{part} {match}"):
        QuantizedReader.open(folder).weight(f"{EXPERT}.weight", torch.bfloat16)


def test_a_missing_part(folder):
    name = f"{EXPERT}.weight_scale"
    path = folder / QuantizedReader.open(folder).files.tensors[name].shard.name
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors, path)
    edit_json(folder / INDEX, lambda index: index["weight_map"].pop(name))
    with pytest.raises(UserError, match=rf"tensor {EXPERT}\.weight_scale is missing"):
        QuantizedReader.open(folder).quantized(EXPERT)


def test_asymmetric_checkpoints_read_back(tmp_path):
    asym = {
        4: WeightSpec(bits=4, group_size=32, symmetric=False),
        8: WeightSpec(bits=8, group_size=WHOLE_ROW, symmetric=False),
    }

    def rule(key):
        spec = int4_rule(key)
        return spec and asym[spec.bits]

    plain = quantized_checkpoint(tmp_path / "m", tiny_config(), rule, max_bytes=20_000)
    reader = QuantizedReader.open(tmp_path / "m")
    reader.check_complete()
    for name, tensor in plain.items():
        assert torch.equal(reader.weight(name, tensor.dtype), tensor)
