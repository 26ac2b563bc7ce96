"""What a run takes on the disk is foreseen before it begins."""

import os
from pathlib import Path

import pytest

from klquant.checkpoint.reader import CheckpointReader
from klquant.errors import UserError
from klquant.pipeline import room as module
from klquant.pipeline.report import Silent
from klquant.pipeline.room import Room, require_room
from klquant.pipeline.run import RunOptions
from klquant.recipe.plan import make_plan
from tests.pipeline.build import ROUND, recipe, run, unfinished

EXACT = "calibration: {mix: tiny, tokens: 256, window: 64, min_expert_tokens: 0, max_tokens: 256}"


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@pytest.mark.parametrize("in_files", [False, True])
@pytest.mark.parametrize("chosen", [recipe(text=EXACT), recipe(ROUND)], ids=["calibrated", "rounded"])
def test_no_moment_of_a_run_takes_more_than_was_foreseen(model, tmp_path, monkeypatch, chosen, in_files):
    if in_files:
        monkeypatch.setattr("klquant.pipeline.placement.MEMORY_SHARE", {"cpu": 0})
    reader, sizes, out = CheckpointReader.open(model), [], tmp_path / "out"
    plan = make_plan(chosen, reader.config, {n: (i.dtype, i.shape) for n, i in reader.tensors.items()}, "klquant")
    foreseen = Room.of(plan, model, RunOptions())
    monkeypatch.setattr("os.replace", _measured(sizes, unfinished(out)))
    run(model, out, chosen, Silent())
    assert foreseen.result < 4 * size(out) and size(out) < foreseen.result
    assert max(sizes) < foreseen.result + foreseen.working < 3 * max(sizes)
    assert (foreseen.working > 0) == plan.needs_calibration


def _measured(sizes: list[int], folder: Path):
    """`os.replace` that notes how large the folder is before a file takes its name."""
    real = os.replace

    def replace(*args):
        sizes.append(size(folder))
        return real(*args)

    return replace


def test_one_runs_working_files_count_and_what_is_written_is_room(tmp_path, monkeypatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: type("usage", (), {"free": 1000}))
    rooms = [Room(300, 100), Room(300, 400)]
    require_room(rooms, tmp_path / "a" / "out", [], "it takes", "do without")
    with pytest.raises(UserError) as error:
        require_room([*rooms, Room(1, 0)], tmp_path / "a" / "out", [], "it takes", "do without")
    assert str(error.value) == (
        f"{tmp_path}: it takes 601 B and 400 B for text and activations until all is done, but only 1.00 kB are free; "
        "free disk space or do without"
    )
    (tmp_path / "out.unfinished").mkdir()
    (tmp_path / "out.unfinished" / "shard").write_bytes(b"x")
    require_room([*rooms, Room(1, 0)], tmp_path / "out", [tmp_path / "out.unfinished"], "it takes", "do without")
