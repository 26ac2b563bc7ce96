"""A folder of finished windows: found again by its purpose, and damage named."""

import os

import pytest
import torch

from klquant.checkpoint import writer
from klquant.errors import UserError
from klquant.evaluate.windows import WindowFolder

PURPOSE = {"text": "abc", "windows": 2}
TENSORS = {"a": torch.arange(12.0).view(4, 3), "b": torch.arange(4)}


def test_windows_are_found_again_for_their_purpose_only(tmp_path):
    folder = WindowFolder.open(tmp_path / "w", PURPOSE)
    folder.write(1, TENSORS)
    again = WindowFolder.open(tmp_path / "w", PURPOSE)
    assert 1 in again and 0 not in again
    file = again.read(1)
    assert all(torch.equal(tensor, TENSORS[name]) for name, tensor in file.tensors().items())
    assert torch.equal(file.rows(["a"], 1, 3)["a"], TENSORS["a"][1:3])
    assert 1 not in WindowFolder.open(tmp_path / "w", PURPOSE | {"windows": 3})


def test_two_processes_write_the_same_window(tmp_path, monkeypatch):
    """The second begins and ends while the first is at it."""
    folder, view = WindowFolder.open(tmp_path / "w", PURPOSE), writer._view

    def meanwhile(tensor):
        monkeypatch.setattr(writer, "_view", view)
        monkeypatch.setattr(os, "getpid", lambda: 1)
        assert 0 not in WindowFolder.open(tmp_path / "w", PURPOSE)
        folder.write(0, TENSORS)
        return view(tensor)

    monkeypatch.setattr(writer, "_view", meanwhile)
    folder.write(0, TENSORS)
    assert torch.equal(folder.read(0)["a"], TENSORS["a"])
    assert {path.name for path in (tmp_path / "w").iterdir()} == {"purpose.json", "window-00000.safetensors"}


def test_a_folder_that_another_process_took_away_is_called_that(tmp_path):
    folder = WindowFolder.open(tmp_path / "w", PURPOSE)
    folder.remove()
    with pytest.raises(UserError, match="w: was taken away by another evaluation with the same output"):
        folder.write(0, TENSORS)


def test_what_a_killed_process_left_goes_in_time(tmp_path):
    folder = tmp_path / "w"
    folder.mkdir()
    halves = [folder / ".1-window-00000.safetensors", folder / ".2-window-00001.safetensors"]
    for half in halves:
        half.touch()
    os.utime(halves[0], (0, 0))
    WindowFolder.open(folder, PURPOSE)
    assert [half.exists() for half in halves] == [False, True]


def test_what_another_process_finishes_meanwhile_is_not_missed(tmp_path, monkeypatch):
    """Its file was seen under its own name, and has the common one by the time its age is asked for."""
    folder = tmp_path / "w"
    WindowFolder.open(folder, PURPOSE)
    half = folder / ".1-window-00000.safetensors"
    half.touch()
    monkeypatch.setattr("klquant.evaluate.windows.time.time", lambda: half.unlink(missing_ok=True) or 0.0)
    WindowFolder.open(folder, PURPOSE)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/w: cannot be created: Not a directory"):
        WindowFolder.open(tmp_path / "file" / "w", PURPOSE)


def test_damaged_windows_are_named(tmp_path):
    """Cut short, another file, or without a tensor that is asked for."""
    folder = WindowFolder.open(tmp_path / "w", PURPOSE)
    folder.write(0, TENSORS)
    damaged = r"window-00000\.safetensors: damaged \(.*\); delete it and run the same command again"
    for ask in (lambda file: file["c"], lambda file: file.rows(["a", "c"], 0, 1)):
        with pytest.raises(UserError, match=damaged):
            ask(folder.read(0))
    path = tmp_path / "w" / "window-00000.safetensors"
    whole = path.read_bytes()
    for cut in (0, 7, 30, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match=damaged):
            folder.read(0)
