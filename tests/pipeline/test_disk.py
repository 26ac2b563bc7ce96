"""A disk that is full, or not to be written: one line, nothing that looks whole, and the run can go on."""

import errno
import os
import resource
from pathlib import Path

import pytest

from klquant.calibrate.activations import Activations
from klquant.checkpoint.verify import verify
from klquant.errors import UserError
from tests.pipeline.build import digests, recipe, run, unfinished


def fails(out, model, match, **options):
    with pytest.raises(UserError, match=match) as error:
        run(model, out, **options)
    assert "\n" not in str(error.value)
    assert not out.exists()
    folder = unfinished(out)
    left = [path.name for path in folder.rglob("*")] if folder.exists() else []
    assert not [name for name in left if name.endswith((".tmp", ".half"))]
    assert bool(verify(folder)) == ("config.json" not in left)  # which is written when all the others are


@pytest.fixture
def limit():
    """Sets the size that no file may exceed; the system then refuses to write on."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def set_limit(nbytes: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))

    yield set_limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("nbytes", "match"),
    [
        (100, r"text\.safetensors: cannot write [\d,]+ bytes: File too large"),
        (20_000, r"model-00001-of-00004\.safetensors: cannot write [\d,]+ bytes"),
        (50_000, r"reference-002\.bin\.half: no room"),
    ],
)
def test_files_that_cannot_grow(model, tmp_path, limit, nbytes, match, whole_digests):
    out = tmp_path / "out"
    limit(nbytes)
    fails(out, model, match)
    limit(resource.RLIM_INFINITY)
    run(model, out, resume=True)
    assert digests(out) == whole_digests


@pytest.mark.parametrize(("share", "file"), [(0.3, r"reference-002\.bin\.half"), (0, r"quantized\.work")])
def test_streams_need_room(model, tmp_path, limit, monkeypatch, share, file):
    """Each stream takes 256 tokens × 64 values × 4 bytes."""
    monkeypatch.setattr("klquant.pipeline.placement.MEMORY_SHARE", {"cpu": share})
    limit(60_000)
    fails(tmp_path / "out", model, f"{file}: no room for .* of activations", shard_bytes=20_000)
    limit(resource.RLIM_INFINITY)
    run(model, tmp_path / "out", resume=True, shard_bytes=20_000)
    assert verify(tmp_path / "out") == []


def full(monkeypatch, owner, name: str, at: int) -> list:
    """Make the `at`-th call of `owner.name` say that the disk is full; returns the calls made."""
    real, calls = getattr(owner, name), []

    def call(*args):
        calls.append(args)
        if len(calls) == at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args)

    monkeypatch.setattr(owner, name, call)
    return calls


@pytest.mark.parametrize(
    ("name", "at"),
    [*(("fsync", n) for n in (1, 5, 11, 17, 30)), *(("replace", n) for n in (2, 6, 8, 16, 20, 21, 22))],
)
def test_a_disk_that_fills_up_at_any_time(model, tmp_path, monkeypatch, whole_digests, name, at):
    with monkeypatch.context() as patch:
        full(patch, os, name, at)
        fails(tmp_path / "out", model, "No space left on device")
    run(model, tmp_path / "out", resume=True)
    assert digests(tmp_path / "out") == whole_digests


def test_streams_that_cannot_be_written(model, tmp_path, monkeypatch):
    monkeypatch.setattr("klquant.pipeline.placement.MEMORY_SHARE", {"cpu": 0})
    full(monkeypatch, os, "pwritev", 12)
    fails(tmp_path / "out", model, r"(quantized|reference).*: cannot be written: No space left on device")


def test_streams_that_are_cut_short_meanwhile(model, tmp_path, monkeypatch, whole_digests):
    """Somebody truncates the file that a layer works in: the run stops, and a resumed one fills it anew."""
    out, write = tmp_path / "out", Activations.write
    monkeypatch.setattr("klquant.pipeline.placement.MEMORY_SHARE", {"cpu": 0})

    def cut(self, start, values):
        write(self, start, values)
        if self.path.name == "quantized.work":
            os.truncate(self.path, 9)

    with monkeypatch.context() as patch:
        patch.setattr(Activations, "write", cut)
        fails(out, model, r"quantized\.work: cut short while in use; go on with --resume")
    run(model, out, resume=True)
    assert digests(out) == whole_digests


def link(out):
    (out.parent / "empty").mkdir()
    out.symlink_to(out.parent / "empty")


@pytest.mark.parametrize("make", [lambda out: out.touch(), lambda out: (out / "a").mkdir(parents=True), link])
def test_an_output_that_is_in_use_is_refused(model, tmp_path, make):
    """A link, too: at the end OUT gets its name by a rename, which cannot follow one."""
    out = tmp_path / "out"
    make(out)
    with pytest.raises(UserError, match="out: exists and is not an empty folder"):
        run(model, out)
    assert not unfinished(out).exists()


@pytest.mark.parametrize("name", ["", ".", "..", "/", "a/.."])
def test_an_output_without_a_name_of_its_own_is_refused(model, tmp_path, monkeypatch, name):
    """The unfinished folder is called after it, and it must be possible to replace it."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="is no name for a new folder"):
        run(model, Path(name))
    assert not list(tmp_path.iterdir())


def test_an_output_that_is_taken_meanwhile(model, tmp_path, whole_digests, monkeypatch):
    out = tmp_path / "out"
    real = os.replace

    def replace(source, target):
        if str(target) == str(out):
            out.mkdir()
            (out / "stray").touch()
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(UserError, match=r"out: cannot take the finished out\.unfinished"):
            run(model, out)
    (out / "stray").unlink()
    run(model, out, resume=True)
    assert digests(out) == whole_digests


def test_a_folder_that_cannot_be_made(model, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"out: cannot be created: .*/file is a file; choose another output"):
        run(model, tmp_path / "file" / "out", recipe())
