"""`klquant verify`: exit code 0 and a line, 1 and a list, 2 for what is no checkpoint folder at all."""

import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from klquant.checkpoint.index import PROVENANCE
from klquant.cli.main import main
from tests.checkpoint.build import quantized_checkpoint
from tests.tiny import tiny_config


def verify(folder):
    return CliRunner().invoke(main, ["verify", str(folder)], prog_name="klquant", catch_exceptions=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "out"
    quantized_checkpoint(folder, tiny_config(), max_bytes=50_000)
    return folder


@pytest.fixture
def copy(made, tmp_path) -> Path:
    return shutil.copytree(made, tmp_path / "out")


def test_a_good_checkpoint_is_one_line(made, tiny):
    result = verify(made)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith(f"{made}: good: 351 tensors, ") and result.stdout.count("\n") == 1
    assert result.stdout.endswith("; the weight files are as they were written\n")
    assert verify(tiny).stdout.endswith("; no hashes to compare with\n")


def test_problems_are_listed_and_counted(copy):
    shards = sorted(copy.glob("*.safetensors"))
    for shard in shards[:2]:
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        shard.write_bytes(data)
    result = verify(copy)
    assert result.exit_code == 1
    assert [line.partition(": ")[0] for line in result.stdout.splitlines()] == [str(shard) for shard in shards[:2]]
    assert result.stderr == f"klquant: {copy}: 2 problems\n"


def test_a_shard_that_is_gone(copy):
    next(copy.glob("*.safetensors")).unlink()
    result = verify(copy)
    assert result.exit_code == 1 and "No such file" in result.stdout and "1 problem\n" in result.stderr


def test_no_folder_is_a_users_error(tmp_path):
    result = verify(tmp_path / "out")
    assert (result.exit_code, result.stdout) == (2, "") and result.stderr.count("\n") == 1
    assert "out: no such folder" in result.stderr and "--resume" not in result.stderr
    (tmp_path / "out.unfinished").mkdir()
    assert "out.unfinished is a run to go on with" in verify(tmp_path / "out").stderr


def test_an_unfinished_run_is_not_whole(copy):
    """A folder that lacks what is written last."""
    (copy / "config.json").unlink()
    (copy / PROVENANCE).unlink()
    result = verify(copy)
    assert result.exit_code == 1 and "config.json: no such file" in result.stdout
