"""Files appear whole or not at all, with the safetensors library's bytes, in the planned shards."""

import errno
import hashlib
import itertools
import json
import os
import resource
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save

from klquant.checkpoint.dtypes import DTYPES
from klquant.checkpoint.index import INDEX
from klquant.checkpoint.writer import (
    Shard,
    copy_side_files,
    plan_shards,
    write_index,
    write_json,
    write_safetensors,
)
from klquant.errors import UserError

SOME = {"b": torch.arange(5, dtype=torch.int32), "a": torch.ones(3, 4).bfloat16(), "c.d": torch.tensor([2, 3])}


@pytest.mark.parametrize("metadata", [{}, {"format": "pt"}])
def test_the_bytes_are_those_of_the_library(tmp_path, metadata):
    tensors = {f"t{i}.{name}": torch.ones(3, 2).to(dtype) for i in (2, 1) for name, dtype in DTYPES.items()}
    tensors |= {"scalar": torch.tensor(1.5), "empty": torch.zeros(0, 3), "Größe": torch.zeros(1)}
    record = write_safetensors(tmp_path / "x.safetensors", tensors, metadata)
    data = (tmp_path / "x.safetensors").read_bytes()
    assert data == save(tensors, metadata=metadata or None)
    assert record.file == "x.safetensors" and record.nbytes == len(data)
    assert record.sha256 == hashlib.sha256(data).hexdigest()


def test_the_order_of_tensors_and_metadata_does_not_matter(tmp_path):
    one = write_safetensors(tmp_path / "1", SOME, {"x": "1", "y": "2"})
    two = write_safetensors(tmp_path / "2", dict(reversed(SOME.items())), {"y": "2", "x": "1"})
    assert one.sha256 == two.sha256


def test_non_contiguous_tensors(tmp_path):
    write_safetensors(tmp_path / "x", {"t": torch.arange(6).view(2, 3).T}, {})
    assert torch.equal(load_file(tmp_path / "x")["t"], torch.arange(6).view(2, 3).T)


def test_what_was_there_is_replaced_and_nothing_else_is_left(tmp_path):
    (tmp_path / "x").write_bytes(b"old")
    (tmp_path / ".x.tmp").write_bytes(b"left by a killed run")
    write_safetensors(tmp_path / "x", SOME, {})
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EIO])
def test_a_write_that_fails_leaves_the_old_file_and_says_why(tmp_path, monkeypatch, code):
    def fail(_):
        raise OSError(code, os.strerror(code))

    (tmp_path / "x.safetensors").write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", fail)
    size = len(save(SOME))
    with pytest.raises(UserError, match=rf"x\.safetensors: cannot write {size:,} bytes: {os.strerror(code)}"):
        write_safetensors(tmp_path / "x.safetensors", SOME, {})
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]
    assert (tmp_path / "x.safetensors").read_bytes() == b"old"


def test_a_file_that_does_not_fit(tmp_path):
    """The kernel itself refuses half-way: a file-size limit stands for a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(UserError, match=r"big: cannot write 1,0\d\d,\d\d\d bytes: File too large"):
            write_safetensors(tmp_path / "big", {"t": torch.zeros(1 << 20, dtype=torch.uint8)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"nowhere/x\.json: cannot write 3 bytes: No such file or directory"):
        write_json(tmp_path / "nowhere" / "x.json", {})


def test_an_interrupt_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_json(tmp_path / "x.json", {})
    assert list(tmp_path.iterdir()) == []


def test_everything_is_flushed_before_the_name_appears(tmp_path, monkeypatch):
    """The order that makes it durable: file, name, folder."""
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: events.append(os.readlink(f"/proc/self/fd/{fd}")) or fsync(fd))
    monkeypatch.setattr(os, "replace", lambda a, b: events.append("rename") or replace(a, b))
    write_json(tmp_path / "x.json", {})
    assert events == [str(tmp_path / ".x.json.tmp"), "rename", str(tmp_path)]


def test_killed_while_writing(tmp_path):
    """SIGKILL in the middle of a shard: the name does not appear."""
    script = (
        "import os, signal, sys, torch\n"
        "from pathlib import Path\n"
        "from klquant.checkpoint import writer\n"
        "os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n"
        "writer.write_safetensors(Path(sys.argv[1]), {'t': torch.ones(1000)}, {})\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "x.safetensors")], check=False)
    assert done.returncode == -9
    assert [path.name for path in tmp_path.iterdir()] == [".x.safetensors.tmp"]


def test_json(tmp_path):
    write_json(tmp_path / "x.json", {"b": 1, "a": "ü"})
    assert (tmp_path / "x.json").read_text() == '{\n  "b": 1,\n  "a": "ü"\n}\n'
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "y.json", {"a": float("nan")})
    assert not (tmp_path / "y.json").exists()


UNITS = st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=8), min_size=1, max_size=6)


@given(UNITS, st.integers(1, 100))
def test_shards_hold_every_tensor_once_within_a_unit(sizes, limit):
    units = [[(f"{u}.{t}", size) for t, size in enumerate(unit)] for u, unit in enumerate(sizes)]
    nbytes = dict(itertools.chain.from_iterable(units))
    shards = plan_shards(units, limit)
    assert [name for shard in shards for name in shard.names] == list(nbytes)
    for i, shard in enumerate(shards, 1):
        assert shard.file == f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        assert shard.names and len({name.split(".")[0] for name in shard.names}) == 1
        assert len(shard.names) == 1 or sum(nbytes[name] for name in shard.names) <= limit
    for one, two in itertools.pairwise(shards):  # none is opened before the last is full
        same_unit = one.names[0].split(".")[0] == two.names[0].split(".")[0]
        assert not same_unit or sum(nbytes[name] for name in one.names) + nbytes[two.names[0]] > limit


def test_the_index(tmp_path):
    shards = [Shard("1.safetensors", ("b", "a")), Shard("2.safetensors", ("c",))]
    write_index(tmp_path, shards, {"a": 1, "b": 2, "c": 3})
    assert json.loads((tmp_path / INDEX).read_text()) == {
        "metadata": {"total_size": 6},
        "weight_map": {"b": "1.safetensors", "a": "1.safetensors", "c": "2.safetensors"},
    }


def test_side_files(tmp_path):
    source, target = tmp_path / "a", tmp_path / "b"
    source.mkdir()
    target.mkdir()
    wanted = [
        "LICENSE", "LICENSE.txt", "NOTICE", "chat_template.jinja", "generation_config.json", "special_tokens_map.json",
        "tiktoken.model", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    others = [
        "config.json", "model.safetensors", "tokenization_kimi.py", "tokenizer.py", "tokenizer.pkl", "tokenizer.bin",
        "modeling_kimi.py", "README.md",
    ]  # fmt: skip
    for name in wanted + others:
        (source / name).write_text(name)
    (source / "tokenizer").mkdir()
    assert copy_side_files(source, target) == wanted
    assert {path.name: path.read_text() for path in target.iterdir()} == {name: name for name in wanted}


def test_side_files_do_not_follow_links_out_of_the_folder(tmp_path):
    (tmp_path / "secret").write_text("secret")
    source, target = tmp_path / "a", tmp_path / "b"
    source.mkdir()
    target.mkdir()
    (source / "LICENSE").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match="LICENSE links to a file outside"):
        copy_side_files(source, target)
    assert not list(target.iterdir())


def test_a_side_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    """Said by the file system here, for whoever runs tests may be allowed to read everything."""

    def refuse(path, *_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "LICENSE").touch()
    monkeypatch.setattr(type(tmp_path), "open", refuse)
    with pytest.raises(UserError, match="a/LICENSE: cannot be read: Permission denied"):
        copy_side_files(tmp_path / "a", tmp_path)
