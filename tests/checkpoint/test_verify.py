"""`verify` finds each kind of damage, names it, and is content with what is whole."""

import hashlib
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from klquant.checkpoint.index import INDEX, PROVENANCE
from klquant.checkpoint.reader import CheckpointReader
from klquant.checkpoint.verify import verify
from tests.checkpoint.build import edit_json, quantized_checkpoint
from tests.tiny import tiny_config

EXPERT = "model.layers.1.block_sparse_moe.experts.3.w1"


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized") / "model"
    quantized_checkpoint(folder, tiny_config(), max_bytes=50_000)
    return folder


@pytest.fixture
def folder(quantized, tmp_path):
    return shutil.copytree(quantized, tmp_path / "model")


def shard_of(folder, name):
    return CheckpointReader.open(folder).tensors[name].shard


def change_tensor(folder, name, change):
    """Change a tensor and drop the provenance, so that the value itself has to be found out."""
    path = shard_of(folder, name)
    tensors = load_file(path)
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, path)
    (folder / PROVENANCE).unlink()


def only(folder, *parts):
    """Exactly one problem, one line, with these parts in it."""
    problems = verify(folder)
    assert len(problems) == 1 and "\n" not in problems[0], problems
    for part in parts:
        assert part in problems[0]


def test_good_checkpoints(quantized, tiny):
    assert verify(quantized) == []
    assert verify(tiny) == []


def test_the_testbed_is_good(testbed):
    assert verify(testbed) == []


def test_what_cannot_be_opened_is_one_problem(folder):
    (folder / "config.json").unlink()
    only(folder, "config.json: no such file")


def test_any_bit_of_a_shard(folder):
    """A flipped code is finite and positive: only the hash can tell."""
    info = CheckpointReader.open(folder).tensors[f"{EXPERT}.weight_packed"]
    data = bytearray(info.shard.read_bytes())
    data[info.offset + 5] ^= 1
    info.shard.write_bytes(data)
    only(folder, info.shard.name, "SHA-256")


def test_a_shard_of_another_size(folder):
    name = shard_of(folder, "lm_head.weight_scale").name
    edit_json(folder / PROVENANCE, lambda p: p["shards"][name].update(bytes=1))
    only(folder, name, "another size or SHA-256")


def test_a_shard_that_provenance_does_not_know(folder):
    name = shard_of(folder, "lm_head.weight_scale").name
    edit_json(folder / PROVENANCE, lambda p: p["shards"].pop(name))
    only(folder, name, "not listed in klquant.json")


def test_a_shard_that_only_provenance_knows(folder):
    edit_json(folder / PROVENANCE, lambda p: p["shards"].update({"model-9.safetensors": {"sha256": "", "bytes": 0}}))
    only(folder, "model-9.safetensors: cannot be read")


def test_provenance_does_not_leave_the_folder(folder):
    edit_json(folder / PROVENANCE, lambda p: p["shards"].update({"../x": {"sha256": "", "bytes": 0}}))
    only(folder, PROVENANCE, "plain file name")


def test_a_side_file_that_changed_or_is_gone(folder):
    file = folder / "tokenizer.json"
    data = file.read_bytes()
    entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    edit_json(folder / PROVENANCE, lambda p: p.update(files={"tokenizer.json": entry}))
    assert verify(folder) == []
    file.write_bytes(data + b" ")
    only(folder, "tokenizer.json: differs from what was written")
    file.unlink()
    only(folder, "tokenizer.json: cannot be read")


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"shards": 3}', '{"shards": {"a": 1}}', '{"shards": {}, "files": 3}']
)
def test_a_broken_provenance(folder, text):
    (folder / PROVENANCE).write_text(text)
    only(folder, f"{PROVENANCE}: ")


def test_total_size(folder):
    edit_json(folder / INDEX, lambda index: index["metadata"].update(total_size=7))
    only(folder, INDEX, "total_size is 7, but the tensors take")


def test_every_missing_and_unknown_tensor_is_listed(folder):
    name = f"{EXPERT}.weight_scale"
    path = shard_of(folder, name)
    tensors = load_file(path)
    tensors["stray"] = tensors.pop(name)
    save_file(tensors, path)
    edit_json(folder / INDEX, lambda index: index["weight_map"].update(stray=index["weight_map"].pop(name)))
    (folder / PROVENANCE).unlink()
    problems = verify(folder)
    assert [name in problems[0], "'stray' is not part" in problems[1], len(problems)] == [True, True, 2]


def test_a_wrong_shape(folder):
    change_tensor(folder, f"{EXPERT}.weight_packed", lambda t: t[:, :-1])
    edit_json(folder / INDEX, lambda index: index.pop("metadata"))
    only(folder, f"{EXPERT}.weight_packed has shape")


def test_a_wrong_dtype(folder):
    change_tensor(folder, f"{EXPERT}.weight_packed", lambda t: t.view(torch.float32))
    only(folder, f"{EXPERT}.weight_packed has dtype F32, expected I32")


def test_a_dtype_that_has_no_arithmetic(folder):
    change_tensor(folder, f"{EXPERT}.weight_scale", lambda t: t.to(torch.float8_e4m3fn))
    edit_json(folder / INDEX, lambda index: index.pop("metadata"))
    only(folder, f"{EXPERT}.weight_scale has dtype F8_E4M3, expected BF16 or F16 or F32")


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        (f"{EXPERT}.weight_scale", lambda t: t * float("inf"), "NaN or infinite"),
        (f"{EXPERT}.weight_scale", lambda t: t * 0, "not positive"),
        (f"{EXPERT}.weight_shape", lambda t: t.flip(0), "implies [32, 64]"),
        ("model.layers.0.self_attn.A_log", lambda t: t * float("nan"), "NaN or infinite"),
        ("model.embed_tokens.weight", lambda t: torch.where(t == t[-1, -1], float("nan"), t), "NaN or infinite"),
    ],
)
def test_values(folder, name, change, match, monkeypatch):
    monkeypatch.setattr("klquant.checkpoint.reader.CHUNK", 64)  # the last chunk counts as well
    change_tensor(folder, name, change)
    only(folder, shard_of(folder, name).name, f"tensor {name}", match)


def test_a_group_without_modules(folder):
    def add(config):
        groups = config["quantization_config"]["config_groups"]
        groups["group_9"] = groups["group_0"] | {"targets": ["re:.*experts.*nothing"]}

    edit_json(folder / "config.json", add)
    only(folder, "group group_9 matches no module")


def test_a_config_that_claims_other_bits(folder):
    edit_json(
        folder / "config.json",
        lambda c: c["quantization_config"]["config_groups"]["group_0"]["weights"].update(num_bits=8),
    )
    problems = verify(folder)
    assert len(problems) == 3 * 8 * 3  # every packed expert: 3 layers, 8 experts, 3 matrices
    assert all("weight_packed has shape" in problem for problem in problems)
