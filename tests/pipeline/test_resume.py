"""A run that was stopped, however and wherever, goes on and ends with the bytes of an undisturbed one."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import klquant.calibrate.experts as experts
import klquant.pipeline.run as pipeline
from klquant.checkpoint.verify import verify
from klquant.errors import UserError
from klquant.pipeline import streams
from klquant.pipeline.journal import Journal
from klquant.pipeline.report import Silent
from klquant.pipeline.streams import COPY_SHARE, StreamStore  # before it is changed for this folder
from klquant.recipe.targets import TARGETS
from tests.pipeline.build import RULES, TEXT, Stop, Stopped, digests, recipe, run, short_model, unfinished

RENAMES = 22  # of an undisturbed run; `test_every_rename_was_tried` holds it to that
CASES = {
    **{f"before rename {n}": [["before", n]] for n in range(1, RENAMES + 1)},
    "after the last rename of the state": [["after", RENAMES - 1]],
    "after the first unit": [["done", "embedding"]],
    "reading the text": [["phase", "calibration", "probing"]],
    "in mid layer": [["phase", "layer 1", "experts"]],
    "in the head": [["phase", "head", "head inputs"]],
    "while a shard is written": [["block", 40]],
    "while a stream is written": [["stream", 2]],
    "while the state is removed": [["remove", 7]],
    "again and again": [
        ["before", 2], ["before", 4], ["phase", "layer 0", "MLP"], ["before", 7], ["before", 4],
        ["phase", "layer 1", "experts"], ["before", 3], ["before", 5], ["before", 4],
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> tuple[Path, dict[str, list[int]]]:
    """Folder with every case's outcome, and how its processes ended."""
    folder = tmp_path_factory.mktemp("killed")
    command = [sys.executable, "-m", "tests.pipeline.killed", str(folder), json.dumps(CASES)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


@pytest.mark.parametrize("case", CASES)
def test_killed_runs_end_with_the_same_bytes(killed, case):
    folder, ended = killed
    assert ended[case] == [-9] * len(CASES[case]) + [0]
    assert digests(folder / case) == digests(folder / "whole")
    assert not unfinished(folder / case).exists()


def test_every_rename_was_tried(model, tmp_path, monkeypatch):
    calls = []
    real = os.replace
    monkeypatch.setattr("os.replace", lambda *args: (calls.append(args), real(*args)))
    run(model, tmp_path / "out")
    assert len(calls) == RENAMES


def test_another_process_gets_the_same_bytes(killed, whole_digests):
    assert digests(killed[0] / "whole") == whole_digests


@pytest.fixture
def stopped(model, tmp_path) -> Path:
    """OUT of a run that stopped in its second layer."""
    out = tmp_path / "out"
    with pytest.raises(Stopped):
        run(model, out, watcher=Stop("layer 1"))
    return out


def refused(out: Path, text: str, model: Path, *args, **options) -> None:
    before = digests(unfinished(out))
    with pytest.raises(UserError, match=text) as error:
        run(model, out, *args, **options)
    assert "\n" not in str(error.value) and not out.exists()
    assert digests(unfinished(out)) == before


@pytest.mark.parametrize(("since", "due"), [(19.9, False), (20.1, True)])
def test_copies_of_streams_take_a_twentieth_of_the_time(monkeypatch, since, due):
    """The last took a second, so the next is due after twenty."""
    monkeypatch.setattr(streams, "COPY_SHARE", COPY_SHARE)
    monkeypatch.setattr(streams, "time", SimpleNamespace(monotonic=lambda: 100 + since))
    store = StreamStore.__new__(StreamStore)
    store._saved, store._took = 100, 1.0
    assert store.due == due


@pytest.mark.parametrize(("lost", "again"), [(False, "layer 1"), (True, "layer 0, layer 1")])
def test_what_came_after_the_last_copy_is_done_again(model, tmp_path, monkeypatch, whole_digests, lost, again):
    """Time for one copy only, after the first layer; or not even that one is left."""
    monkeypatch.setattr("klquant.pipeline.streams.COPY_SHARE", 0)
    out, notes = tmp_path / "out", []
    with pytest.raises(Stopped):
        run(model, out, watcher=Stop("head"))
    state = unfinished(out) / ".state"
    assert sorted(path.name for path in state.glob("*.bin")) == ["quantized-002.bin", "reference-002.bin"]
    if lost:
        (state / "reference-002.bin").unlink()
    watcher = Silent()
    watcher.note, watcher.begin = notes.append, lambda names, finished: notes.append(names[finished])
    run(model, out, watcher=watcher, resume=True)
    assert notes[0] == again.split(",")[0]
    assert f"{again}: done again, for the activations were last saved before" in notes
    assert digests(out) == whole_digests


def test_a_stopped_run_looks_like_nothing_whole(stopped):
    assert not stopped.exists()
    names = {path.name for path in unfinished(stopped).iterdir()}
    assert not names & {"config.json", "model.safetensors.index.json", "klquant.json"}


def test_without_resume_an_unfinished_run_is_not_touched(stopped, model):
    refused(stopped, "an unfinished run is there; continue it with --resume", model)


def test_resume_without_an_unfinished_run_begins_one(model, tmp_path, whole_digests):
    run(model, tmp_path / "out", resume=True)
    assert digests(tmp_path / "out") == whole_digests


def test_other_weights_are_refused(stopped, model, tmp_path):
    other = shutil.copytree(model, tmp_path / "other")
    shard = other / "model-00002-of-00002.safetensors"
    tensors = load_file(shard)
    tensors["lm_head.weight"][7, 7] += 1
    save_file(tensors, shard, metadata={"format": "pt"})
    refused(stopped, "was started with other weights; resume it as it was started", other, resume=True)


def test_a_renamed_or_moved_model_is_not_another_one(stopped, model, tmp_path, whole_digests):
    run(shutil.copytree(model, tmp_path / "moved"), stopped, resume=True)
    assert digests(stopped) == whole_digests


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"rules": RULES.replace("bits: 4", "bits: 3")}, "other rules of the recipe"),
        ({"rules": RULES.replace("gptq", "awq", 1)}, "other rules of the recipe"),
        ({"gptq": "refine_rounds: 1"}, "gptq.refine_rounds 0, not 1"),
        ({"text": TEXT.replace("window: 64", "window: 32")}, "calibration.window 64, not 32"),
        ({"text": TEXT.replace("tokens: 256", "tokens: 128")}, "calibration.tokens 256, not 128"),
    ],
)
def test_another_recipe_is_refused_by_what_differs(stopped, model, changes, what):
    refused(stopped, f"was started with {what}; resume it as it was started", model, recipe(**changes), resume=True)


def test_a_recipe_of_another_name_is_just_named(stopped, model):
    other = recipe(gptq="damp: 0.02").model_copy(update={"name": "other"})
    refused(stopped, "was started with recipe small, not other; resume", model, other, resume=True)


def test_what_an_older_run_did_not_keep_is_not_named(stopped, model):
    file = unfinished(stopped) / ".state" / "purpose.json"
    purpose = json.loads(file.read_text())
    del purpose["settings"]
    file.write_text(json.dumps(purpose))
    refused(stopped, "was started with another recipe, target or", model, recipe(gptq="damp: 0.02"), resume=True)


def test_another_target_is_refused(stopped, model, monkeypatch):
    monkeypatch.setitem(TARGETS, "other", TARGETS["klquant"])
    refused(stopped, "was started with target klquant, not other; resume", model, resume=True, target="other")


def test_other_text_is_refused(stopped, model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Quite another text. " * 40)
    refused(stopped, f"with other calibration text: tiny, not {text}; resume", model, resume=True, calib=str(text))
    refused(stopped, "with other calibration text: tiny, not self; resume", model, resume=True, calib="self")


def test_another_shard_size_is_refused(stopped, model):
    what = "was started with shards of 5,000,000,000 bytes, not 50,000; resume"
    refused(stopped, what, model, resume=True, shard_bytes=50_000)


def test_another_kind_of_device_is_refused(stopped, model, monkeypatch):
    """A GPU works in other precision and order."""
    monkeypatch.setattr(pipeline, "pick_devices", lambda names: [torch.device("cuda")])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some card")
    what = "was started with the device 'cpu [A-Z0-9]+, [0-9]+ threads?', not 'cuda some card'; resume"
    refused(stopped, what, model, resume=True, device="cuda")


def test_where_nothing_can_be_resumed_a_run_begins_and_says_so(model, tmp_path, whole_digests):
    """A mistyped output must not cost the whole run again unnoticed."""
    notes = []

    class Listening(Silent):
        def note(self, text: str) -> None:
            notes.append(text)

    run(model, tmp_path / "out", watcher=Listening(), resume=True)
    assert sum(f"nothing to resume at {tmp_path / 'out'}" in note for note in notes) == 1
    assert digests(tmp_path / "out") == whole_digests


def test_a_cpu_with_other_instructions_is_refused(stopped, model, monkeypatch):
    """It adds in other orders."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "some instructions")
    refused(
        stopped, "was started with the device 'cpu [A-Z0-9]+, [0-9]+ threads?', not 'cpu some instr", model, resume=True
    )


def test_another_number_of_threads_is_refused(stopped, model, monkeypatch):
    """They share sums among them."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    refused(stopped, ", [0-9]+ threads?', not 'cpu .*, 77 threads'; resume", model, resume=True)


@pytest.mark.parametrize("damage", ["missing", "short"])
def test_a_finished_shard_that_is_not_whole_is_named(stopped, model, damage):
    shard = min(unfinished(stopped).glob("*.safetensors"))
    shard.unlink() if damage == "missing" else shard.write_bytes(shard.read_bytes()[:-1])
    refused(stopped, rf"{shard.name}: (is missing|has .* bytes and was written with)", model, resume=True)


@pytest.mark.parametrize("finished", [False, True])
def test_a_run_that_another_overtook_leaves_its_folder_alone(model, tmp_path, monkeypatch, finished):
    """Both begin; while the first draws its text the other works in the same place, and stops or ends."""
    out, draw = tmp_path / "out", pipeline.draw_text

    def slow(*args):
        monkeypatch.setattr(pipeline, "draw_text", draw)
        if finished:
            run(model, out)
        else:
            with pytest.raises(Stopped):
                run(model, out, watcher=Stop("layer 1"))
        return draw(*args)

    monkeypatch.setattr(pipeline, "draw_text", slow)
    match = "exists and is not an empty folder" if finished else "an unfinished run is there"
    with pytest.raises(UserError, match=match):
        run(model, out, recipe(gptq="damp: 0.02"))
    if not finished:
        run(model, out, resume=True)
    assert not verify(out)
    assert not unfinished(out).exists()


def test_every_change_is_named(stopped, model):
    match = "with gptq.damp 0.05, not 0.02; gptq.refine_rounds 0, not 3; shards of 5,000,000,000 bytes, not 50,000;"
    refused(stopped, match, model, recipe(gptq="damp: 0.02"), resume=True, shard_bytes=50_000)


@pytest.mark.parametrize("module", ["klquant", "torch"])
def test_another_version_is_refused(stopped, model, monkeypatch, module):
    monkeypatch.setattr(f"{module}.__version__", "0.0.9")
    refused(stopped, rf"was started with {module} [\w.+]+, not 0\.0\.9; resume", model, resume=True)


def test_two_runs_do_not_share_a_folder(stopped, model):
    with Journal(stopped) as journal:
        journal.find(resume=True)
        refused(stopped, "another run is at work there", model, resume=True)


def test_an_unfinished_run_of_another_format_is_refused(stopped, model):
    file = unfinished(stopped) / ".state" / "purpose.json"
    purpose = json.loads(file.read_text())
    del purpose["shard_bytes"]
    file.write_text(json.dumps(purpose))
    refused(stopped, "another version of klquant", model, resume=True)


@pytest.mark.parametrize("name", ["purpose.json", "unit-001.json", "text.safetensors", "quantized-002.bin"])
def test_a_damaged_state_is_one_line(stopped, model, name):
    file = unfinished(stopped) / ".state" / name
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(UserError, match=rf"{name}: .*delete .*out\.unfinished and start again"):
        run(model, stopped, resume=True)
    assert not stopped.exists()


def test_tokens_that_fill_no_whole_windows_are_the_same_when_resumed(model, tmp_path):
    odd = recipe(text="calibration: {mix: tiny, tokens: 100, window: 64, min_expert_tokens: 0, max_tokens: 100}")
    assert run(model, tmp_path / "whole", odd)["calibration"]["windows"] == 2
    with pytest.raises(Stopped):
        run(model, tmp_path / "out", odd, watcher=Stop("layer 1"))
    run(model, tmp_path / "out", odd, resume=True)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_free_memory_at_the_time_of_the_resume_does_not_matter(stopped, model, monkeypatch, whole_digests):
    monkeypatch.setattr(experts, "free_memory", lambda device: 1)
    run(model, stopped, resume=True)
    assert digests(stopped) == whole_digests


def test_a_resumed_run_probes_nothing_again(stopped, model, monkeypatch):
    monkeypatch.delattr("klquant.pipeline.text.draw_windows")
    run(model, stopped, resume=True)


def test_sampled_text_is_kept(tmp_path):
    """Sampling takes long, and a GPU may sample other tokens the second time."""
    model = short_model(tmp_path / "model")
    with pytest.raises(Stopped):
        run(model, tmp_path / "out", watcher=Stop("head"), calib="self")
    with pytest.raises(UserError, match="other calibration text"):
        run(model, tmp_path / "out", resume=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr("klquant.pipeline.text.sample_windows")
        run(model, tmp_path / "out", resume=True, calib="self")
    run(model, tmp_path / "again", calib="self")
    assert digests(tmp_path / "out") == digests(tmp_path / "again")


def test_streams_in_files_give_the_same_bytes(model, tmp_path, monkeypatch, whole_digests):
    monkeypatch.setattr("klquant.pipeline.placement.MEMORY_SHARE", {"cpu": 0})
    with pytest.raises(Stopped):
        run(model, tmp_path / "out", watcher=Stop("layer 1", "MLP"))
    assert (unfinished(tmp_path / "out") / ".state" / "quantized.work").exists()
    monkeypatch.undo()
    run(model, tmp_path / "out", resume=True)
    assert digests(tmp_path / "out") == whole_digests
