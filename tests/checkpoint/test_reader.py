"""Opening and reading a checkpoint folder: what is refused, by which name, and what a read gives."""

import gzip
import json
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from klquant.checkpoint.index import INDEX, MAX_JSON, inside, read_json, read_tensor_index
from klquant.checkpoint.reader import CheckpointReader, is_finite
from klquant.errors import UserError
from tests.checkpoint.build import edit_json
from tests.tiny import tiny_checkpoint, tiny_config, tiny_tensors, write_checkpoint

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
NORM = "model.norm.weight"


@pytest.fixture
def folder(tiny, tmp_path):
    """A copy of the tiny checkpoint to damage."""
    return shutil.copytree(tiny, tmp_path / "model")


def open_whole(folder):
    reader = CheckpointReader.open(folder)
    reader.check_complete()
    return reader


def refuses(folder, match):
    with pytest.raises(UserError, match=match) as info:
        open_whole(folder)
    assert "\n" not in str(info.value)


def save_again(path, change):
    """Load a shard, change its tensors in place, write it back."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_reads_what_was_written(tiny):
    reader = open_whole(tiny)
    for name, tensor in tiny_tensors(tiny_config()).items():
        read = reader.read(name)
        assert read.dtype == tensor.dtype and torch.equal(read, tensor)
        assert torch.equal(torch.cat(list(reader.chunks(name))), tensor.flatten())
        assert torch.equal(reader.weight(name, torch.float32), tensor.float())


def test_reads_into_a_given_buffer(tiny):
    reader = CheckpointReader.open(tiny)
    out = torch.full((64,), float("nan"), dtype=torch.bfloat16)
    assert reader.read(NORM, out=out) is out and torch.equal(out, reader.read(NORM))
    with pytest.raises(AssertionError):
        reader.read(NORM, out=torch.empty(64))


def test_chunks_are_small(tiny, monkeypatch):
    monkeypatch.setattr("klquant.checkpoint.reader.CHUNK", 1000)
    reader = CheckpointReader.open(tiny)
    name = "model.embed_tokens.weight"
    chunks = list(reader.chunks(name))
    assert max(chunk.nbytes for chunk in chunks) == 1000
    assert torch.equal(torch.cat(chunks), reader.read(name).flatten())


def test_a_single_file_without_index(tmp_path):
    raw = tiny_config()
    folder = write_checkpoint(tmp_path / "m", raw, tiny_tensors(raw), shards=1)
    (folder / INDEX).unlink()
    (folder / "model-00001-of-00001.safetensors").rename(folder / "model.safetensors")
    assert len(open_whole(folder).tensors) == len(tiny_tensors(raw))


def test_the_testbed_opens(testbed):
    open_whole(testbed)


def test_no_folder(tmp_path):
    refuses(tmp_path / "nowhere", r"nowhere/config\.json: no such file")


def test_no_weights(folder):
    for path in folder.glob("model*"):
        path.unlink()
    refuses(folder, r"neither model\.safetensors\.index\.json nor model\.safetensors")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_only(folder, name):
    for path in folder.glob("model*"):
        path.unlink()
    (folder / name).write_bytes(b"")
    refuses(folder, "safetensors only")


def test_a_missing_shard(folder):
    (folder / SECOND).unlink()
    refuses(folder, rf"{SECOND}: cannot be read: No such file")


def test_a_truncated_shard(folder):
    path = folder / SECOND
    path.write_bytes(path.read_bytes()[:-1])
    refuses(folder, rf"{SECOND}: truncated: tensor .* ends at byte")


def test_a_shard_that_shrinks_after_opening(folder):
    reader = CheckpointReader.open(folder)
    last = max(reader.tensors.values(), key=lambda info: (info.shard.name, info.offset))
    last.shard.write_bytes(last.shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=rf"{SECOND}: tensor {last.name}: the file ends inside it"):
        reader.read(last.name)
    last.shard.unlink()
    with pytest.raises(UserError, match=rf"{SECOND}: tensor {last.name}: cannot be read"):
        reader.read(last.name)
    with pytest.raises(UserError, match=rf"{SECOND}: cannot be read"):
        reader.fingerprint()
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json: cannot be read"):
        reader.fingerprint()


@pytest.mark.parametrize("file", ["../x.safetensors", "/etc/x.safetensors", "a/x.safetensors", "a\\x.safetensors"])
def test_weight_map_must_stay_in_the_folder(folder, file):
    edit_json(folder / INDEX, lambda index: index["weight_map"].update({NORM: file}))
    refuses(folder, r"index\.json: .* is not a plain file name")


def test_weight_map_names_safetensors_only(folder):
    edit_json(folder / INDEX, lambda index: index["weight_map"].update({NORM: "pytorch_model.bin"}))
    refuses(folder, rf"tensor '{NORM}' lies in 'pytorch_model.bin'; only \.safetensors")


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\nb", "\0"])
def test_plain_file_names(tmp_path, name):
    with pytest.raises(UserError, match="plain file name"):
        inside(tmp_path, name, "here")


def test_links_out_of_the_folder_are_refused(folder, tmp_path):
    (folder / SECOND).rename(tmp_path / "elsewhere.safetensors")
    (folder / SECOND).symlink_to(tmp_path / "elsewhere.safetensors")
    refuses(folder, rf"{SECOND} links to a file outside the checkpoint folder")


def test_a_hugging_face_cache_is_read_through_its_links(folder, tmp_path):
    blobs, snapshot = tmp_path / "cache/blobs", tmp_path / "cache/snapshots/abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, path in enumerate(sorted(folder.iterdir())):
        shutil.copy(path, blobs / str(i))
        (snapshot / path.name).symlink_to(f"../../blobs/{i}")
    open_whole(snapshot)


def test_a_link_that_leads_to_itself(folder):
    (folder / SECOND).unlink()
    (folder / SECOND).symlink_to(SECOND)
    refuses(folder, SECOND)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"weight_map": 3}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}'])
def test_an_index_that_is_none(folder, text):
    (folder / INDEX).write_text(text)
    refuses(folder, r"model\.safetensors\.index\.json: ")


def test_an_index_with_a_tensor_twice(folder):
    text = (folder / INDEX).read_text()
    (folder / INDEX).write_text(text.replace('"weight_map": {', f'"weight_map": {{"{NORM}": "{FIRST}",'))
    refuses(folder, f"index.json: '{NORM}' is listed twice")


def test_in_the_index_but_not_in_the_shard(folder):
    save_again(folder / SECOND, lambda tensors: tensors.pop(NORM))
    refuses(folder, rf"{SECOND}: tensor '{NORM}' is missing")


def test_in_the_shard_but_not_in_the_index(folder):
    edit_json(folder / INDEX, lambda index: index["weight_map"].pop(NORM))
    refuses(folder, rf"{SECOND}: tensor {NORM} is not listed")


def test_in_two_shards(folder):
    save_again(folder / FIRST, lambda tensors: tensors.update({NORM: torch.ones(64)}))
    refuses(folder, rf"{SECOND}: tensor {NORM} is also in {FIRST}")


def test_in_another_shard_than_the_index_says(folder):
    edit_json(folder / INDEX, lambda index: index["weight_map"].update({NORM: FIRST}))
    refuses(folder, rf"{SECOND}: tensor {NORM} is here, but .* places it in {FIRST}")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "not valid JSON"),
        ("{'a': 1}", "not valid JSON"),
        ("[" * 100_000, r"not valid JSON \(nested too deeply\)"),
        ("[]", "not a JSON object"),
        ('{"model_type": "llama"}', "model_type is 'llama', not 'kimi_linear'"),
        (b'{"model_type": "\xff"}', "not valid JSON"),
    ],
)
def test_a_config_that_is_none(folder, text, match):
    (folder / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    refuses(folder, rf"config\.json: {match}")


def test_no_config(folder):
    (folder / "config.json").unlink()
    refuses(folder, r"config\.json: no such file")


def test_a_config_that_is_no_file(folder):
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    refuses(folder, r"config\.json: cannot be read")


def test_a_json_file_without_end_is_not_read_whole(folder):
    with (folder / "config.json").open("r+b") as file:
        file.truncate(MAX_JSON + 1)
    refuses(folder, r"config\.json: larger than 200 MB")


def test_a_config_that_contradicts_the_tensors(folder):
    edit_json(folder / "config.json", lambda raw: raw.update(intermediate_size=96))
    refuses(folder, r"tensor model\.layers\.0\.mlp\.gate_proj\.weight has shape \[128, 64\], .* implies \[96, 64\]")


def test_a_config_with_more_experts_than_tensors(folder):
    edit_json(folder / "config.json", lambda raw: raw.update(num_experts=9))
    refuses(folder, r"gate\.weight has shape \[8, 64\], .* implies \[9, 64\] \(and \d+ more")


def changed(tmp_path, change):
    raw = tiny_config()
    tensors = tiny_tensors(raw)
    change(tensors)
    return write_checkpoint(tmp_path / "m", raw, tensors)


def test_a_missing_tensor(tmp_path):
    refuses(changed(tmp_path, lambda t: t.pop(NORM)), rf"tensor {NORM} is missing")


def test_an_unknown_tensor(tmp_path):
    folder = changed(tmp_path, lambda t: t.update({"model.rotary.inv_freq": torch.ones(2)}))
    refuses(folder, r"tensor 'model\.rotary\.inv_freq' is not part of a Kimi-Linear checkpoint")


def test_a_wrong_shape(tmp_path):
    folder = changed(tmp_path, lambda t: t.update({NORM: torch.ones(63).bfloat16()}))
    refuses(folder, rf"tensor {NORM} has shape \[63\], but config\.json implies \[64\]")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn, torch.int8])
def test_a_wrong_dtype(tmp_path, dtype):
    folder = changed(tmp_path, lambda t: t.update({NORM: torch.ones(64).to(dtype)}))
    refuses(folder, rf"tensor {NORM} has dtype \w+, expected BF16 or F16 or F32")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_values_that_are_not_finite(tmp_path, value, dtype):
    bad = torch.zeros(64, dtype=dtype)
    bad[17] = value
    reader = open_whole(changed(tmp_path, lambda t: t.update({NORM: bad})))
    with pytest.raises(UserError, match=rf"{SECOND}: tensor {NORM} holds NaN or infinite"):
        reader.weight(NORM, torch.float32)


def test_finite_values():
    assert is_finite(torch.tensor([3.0e38, -3.0e38])) and is_finite(torch.tensor([1, 2])) and is_finite(torch.ones(0))


def test_a_tensor_that_is_not_there(tiny):
    with pytest.raises(UserError, match=r"tensor model\.nothing is missing"):
        CheckpointReader.open(tiny).read("model.nothing")


def test_the_fingerprint_is_that_of_the_content(folder, tiny):
    prints = [CheckpointReader.open(f).fingerprint() for f in (tiny, folder)]
    assert prints[0] == prints[1]


@pytest.mark.parametrize("large", [False, True])
def test_the_fingerprint_changes_with_any_tensor(folder, monkeypatch, large):
    if large:  # as for shards too big to be hashed whole
        monkeypatch.setattr("klquant.checkpoint.reader.WHOLE", 0)
    seen = {CheckpointReader.open(folder).fingerprint()}
    infos = list(CheckpointReader.open(folder).tensors.values())
    for info in infos[::10]:
        data = bytearray(info.shard.read_bytes())
        data[info.offset] ^= 1
        info.shard.write_bytes(data)
        seen.add(CheckpointReader.open(folder).fingerprint())
    assert len(seen) == 1 + len(infos[::10])


def test_the_fingerprint_changes_with_the_config(folder):
    before = CheckpointReader.open(folder).fingerprint()
    edit_json(folder / "config.json", lambda raw: raw.update(rms_norm_eps=1e-6))
    assert CheckpointReader.open(folder).fingerprint() != before


def test_the_fingerprint_changes_with_the_order(folder):
    """Two norms exchange their names: same bytes of data, other header."""
    before = CheckpointReader.open(folder).fingerprint()
    names = [f"model.layers.0.{which}_layernorm.weight".encode() for which in ("input", "post_attention")]
    path = folder / FIRST
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = data[:end].replace(names[0], b"?").replace(names[1], names[0]).replace(b"?", names[1])
    path.write_bytes(header + data[end:])
    assert CheckpointReader.open(folder).fingerprint() != before


def describe(folder, raw, tensors, packed=True):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    text = json.dumps({n: {"dtype": "BF16", "shape": list(t.shape)} for n, t in tensors.items()}).encode()
    (folder / "tensors.json").write_bytes(text)
    if packed:
        (folder / "tensors.json").unlink()
        (folder / "tensors.json.gz").write_bytes(gzip.compress(text))
    return folder


@pytest.mark.parametrize("packed", [False, True])
def test_a_description_can_be_planned_but_not_read(tmp_path, packed):
    raw = tiny_config()
    folder = describe(tmp_path / "d", raw, tiny_tensors(raw), packed)
    config, tensors = read_tensor_index(folder)
    assert config.num_layers == 4 and tensors[NORM] == ("BF16", (64,))
    refuses(folder, r"neither model\.safetensors\.index\.json")


def test_a_checkpoint_can_be_planned(tiny):
    config, tensors = read_tensor_index(tiny)
    assert config.hidden_size == 64
    assert tensors["model.layers.0.self_attn.A_log"] == ("F32", (1, 1, 2, 1))


def test_a_description_that_contradicts_the_config(tmp_path):
    raw = tiny_config()
    folder = describe(tmp_path / "d", raw | {"vocab_size": 321}, tiny_tensors(raw))
    with pytest.raises(UserError, match=r"tensors\.json\.gz: tensor model\.embed_tokens.* \[320, 64\], .*\[321, 64\]"):
        read_tensor_index(folder)


@pytest.mark.parametrize("entry", ["3", "{}", '{"dtype": "BF16", "shape": "x"}', '{"shape": [64]}'])
def test_a_description_with_a_broken_entry(tmp_path, entry):
    folder = describe(tmp_path / "d", tiny_config(), {}, packed=False)
    (folder / "tensors.json").write_text(f'{{"{NORM}": {entry}}}')
    with pytest.raises(UserError, match=rf"tensors\.json: tensor '{NORM}': expected an object"):
        read_tensor_index(folder)


# Without the time: processes that share the tests have to agree on their names.
PACKED = gzip.compress(b"{}", mtime=0)


@pytest.mark.parametrize("data", [b"", b"junk", PACKED[:-9], PACKED + b"junk"])
def test_a_description_that_does_not_unpack(tmp_path, data):
    path = tmp_path / "tensors.json.gz"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"tensors\.json\.gz: "):
        read_json(path)


def test_a_quantized_checkpoint_is_not_planned(folder):
    edit_json(folder / "config.json", lambda raw: raw.update(quantization_config={}))
    with pytest.raises(UserError, match="quantized already"):
        read_tensor_index(folder)


def test_the_index_of_the_48b_checkpoint_is_read_in_a_second(kimi_48b):
    start = time.perf_counter()
    config, tensors = read_tensor_index(kimi_48b)
    assert len(tensors) == 20_493 and config.num_experts == 256
    assert time.perf_counter() - start < 2  # 0.2 s on an idle machine


def test_a_second_tiny_checkpoint_has_other_weights(tiny, tmp_path):
    other = tiny_checkpoint(tmp_path / "other", seed=1)
    assert CheckpointReader.open(other).fingerprint() != CheckpointReader.open(tiny).fingerprint()
