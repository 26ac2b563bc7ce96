"""The header reader under fire: a damaged file is a UserError or reads as the safetensors library reads it."""

import json
import random
import struct

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from klquant.checkpoint.header import read_header
from klquant.checkpoint.reader import CheckpointReader
from klquant.errors import UserError
from tests.tiny import tiny_config

TENSORS = {
    "model.norm.weight": torch.arange(6, dtype=torch.bfloat16),
    "a": torch.arange(12, dtype=torch.float32).view(3, 4),
    "b": torch.tensor(7, dtype=torch.int64),
    "empty": torch.zeros(0, 4),
}


@pytest.fixture(scope="module")
def good() -> bytes:
    return save(TENSORS, metadata={"format": "pt"})


@pytest.fixture
def attempt(tmp_path):
    """Write bytes as a one-file checkpoint and read all of it; True when it is accepted."""
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    path = tmp_path / "model.safetensors"

    def run(data: bytes) -> bool:
        path.write_bytes(data)
        try:
            read_header(path)
            reader = CheckpointReader.open(tmp_path)
            tensors = {name: reader.read(name) for name in reader.tensors}
        except UserError as error:
            assert "\n" not in str(error) and str(error).isprintable() and "model.safetensors" in str(error)
            return False
        with safe_open(path, "pt") as theirs:  # raises if the library is stricter than we are
            assert set(theirs.keys()) == set(tensors)
            for name, tensor in tensors.items():
                other = theirs.get_tensor(name)
                assert other.dtype == tensor.dtype and other.shape == tensor.shape
                assert torch.equal(other.view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8))
        return True

    return run


def build(entries: dict | str, data: bytes = b"", pad: bool = True) -> bytes:
    header = (entries if isinstance(entries, str) else json.dumps(entries)).encode()
    header += b" " * (-len(header) % 8 if pad else 0)
    return struct.pack("<Q", len(header)) + header + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_a_good_file_reads(attempt, good):
    assert attempt(good)
    assert attempt(build({"a": entry()}, bytes(8)))
    assert attempt(build({"a": entry(offsets=(4, 12)), "b": entry(shape=(1,), offsets=(0, 4))}, bytes(12)))


def test_what_git_lfs_left_is_called_that(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 4995584424\n")
    with pytest.raises(UserError, match=r"model\.safetensors: is a git-LFS pointer, .*; run git lfs pull"):
        read_header(path)


def test_truncated_anywhere(attempt, good):
    for size in range(len(good)):
        assert not attempt(good[:size]), size


def test_longer_than_it_says(attempt, good):
    assert not attempt(good + b"\0")


def test_every_bit_of_the_header_flipped(attempt, good):
    """Each bit of the length, and each bit of the JSON."""
    end = 8 + int.from_bytes(good[:8], "little")
    for position in range(end):
        for bit in range(8):
            data = bytearray(good)
            data[position] ^= 1 << bit
            attempt(bytes(data))


def test_random_damage(attempt, good):
    rng = random.Random(0)
    end = 8 + int.from_bytes(good[:8], "little")
    for _ in range(2000):
        data = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(8, end)
            match rng.randrange(4):
                case 0:
                    data[at] = rng.randrange(256)
                case 1:
                    del data[at : at + rng.randint(1, 8)]
                case 2:
                    data[at:at] = bytes(rng.choices(b'0123456789[]{},:"- eE.\\', k=rng.randint(1, 8)))
                case 3:
                    other = rng.randrange(8, end)
                    data[at : at + 4] = data[other : other + 4]
        if rng.random() < 0.5:  # keep the length honest, so that the damage reaches the parser
            data[:8] = struct.pack("<Q", end - 8 + len(data) - len(good))
        attempt(bytes(data))


BAD = {
    "no braces": build("[]"),
    "not an object": build('{"a": 3}', bytes(8)),
    "deep nesting": build('{"a":' + "[" * 100_000 + "]" * 100_000 + "}"),
    "a huge number": build('{"a":{"dtype":"F32","shape":[' + "9" * 5000 + '],"data_offsets":[0,8]}}', bytes(8)),
    "not UTF-8": struct.pack("<Q", 8) + b'{"\xff\xff":0',
    "a name twice": build('{"a":' + json.dumps(entry()) + ',"a":' + json.dumps(entry()) + "}", bytes(8)),
    "a key twice": build('{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8)),
    "an unknown key": build({"a": entry() | {"more": 1}}, bytes(8)),
    "a missing key": build({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)),
    "an unknown dtype": build({"a": entry("F31")}, bytes(8)),
    "a dtype that is no string": build({"a": entry() | {"dtype": ["F32"]}}, bytes(8)),
    "a negative size": build({"a": entry(shape=(-2, -1))}, bytes(8)),
    "a fractional size": build('{"a":{"dtype":"F32","shape":[2.0],"data_offsets":[0,8]}}', bytes(8)),
    "a truth value as size": build('{"a":{"dtype":"F32","shape":[2,true],"data_offsets":[0,8]}}', bytes(8)),
    "too many dimensions": build({"a": entry(shape=(2, *[1] * 70))}, bytes(8)),
    "an overflowing shape": build({"a": entry(shape=(1 << 40, 1 << 40, 0), offsets=(0, 0))}),
    "one offset": build({"a": entry(offsets=(8,))}, bytes(8)),
    "fractional offsets": build('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0.0,8.0]}}', bytes(8)),
    "offsets that are text": build({"a": entry() | {"data_offsets": "08"}}, bytes(8)),
    "offsets backwards": build({"a": entry(shape=(0,), offsets=(8, 8)), "b": entry(offsets=(8, 0))}, bytes(8)),
    "bytes unequal to the shape": build({"a": entry(shape=(3,))}, bytes(8)),
    "an overlap": build({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)),
    "the same bytes twice": build({"a": entry(), "b": entry()}, bytes(8)),
    "an overlap made up for by unused bytes": build({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(16)),
    "a gap": build({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20)),
    "data before the first tensor": build({"a": entry(offsets=(4, 12))}, bytes(12)),
    "data after the last tensor": build({"a": entry()}, bytes(9)),
    "offsets past the end": build({"a": entry(shape=(1 << 40,), offsets=(0, 4 << 40))}, bytes(8)),
    "metadata that is no object": build({"__metadata__": [], "a": entry()}, bytes(8)),
    "metadata that is not text": build({"__metadata__": {"x": 1}, "a": entry()}, bytes(8)),
    "a line break in a name": build({"a\nb": entry()}, bytes(8)),
    "half a surrogate in a name": build('{"\\ud800":' + json.dumps(entry()) + "}", bytes(8)),
    "an absurd header length": struct.pack("<Q", 1 << 62) + b"{}",
    "a negative header length": struct.pack("<q", -1) + b"{}",
}


@pytest.mark.parametrize("case", BAD)
def test_bad_headers_are_refused(attempt, case):
    assert not attempt(BAD[case])


def test_a_header_beyond_the_limit_is_not_read(tmp_path):
    """A sparse file of the claimed size: the length alone must be refused, before anything is allocated."""
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 200_000_000) + b"{")
        file.truncate(300_000_000)
    with pytest.raises(UserError, match="header length"):
        read_header(path)
    with pytest.raises(SafetensorError):
        safe_open(path, "pt")


def test_a_header_longer_than_the_file_is_named_as_such(tmp_path, good):
    path = tmp_path / "x.safetensors"
    path.write_bytes(good[:100])
    with pytest.raises(UserError, match="truncated or not a safetensors file"):
        read_header(path)


def test_errors_name_the_tensor(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(build({"model.norm.weight": entry(shape=(3,))}, bytes(8)))
    with pytest.raises(UserError, match=r"x\.safetensors: tensor model\.norm\.weight"):
        read_header(path)
