"""`klquant quantize` through the command line: what it prints, how it stops, and what it refuses."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from klquant.checkpoint.index import INDEX
from klquant.checkpoint.verify import verify
from klquant.cli.main import main
from klquant.cli.summary import next_commands
from tests.checkpoint.build import edit_json
from tests.pipeline.build import ROUND, recipe_text, short_model, unfinished
from tests.recipe.build import WIDE
from tests.tiny import tiny_checkpoint

ROOT = Path(__file__).parents[2]
W1 = "model.layers.1.block_sparse_moe.experts.1.w1.weight"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return short_model(tmp_path_factory.mktemp("short") / "model")


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """The small recipe as a file."""
    file = tmp_path_factory.mktemp("recipe") / "small.yaml"
    file.write_text(recipe_text())
    return file


def quantize(*args):
    return CliRunner().invoke(main, ["quantize", *map(str, args)], prog_name="klquant", catch_exceptions=False)


@pytest.fixture(scope="module")
def done(model, small, tmp_path_factory):
    """An ordinary run on a pipe, and its output folder."""
    out = tmp_path_factory.mktemp("done") / "out"
    result = quantize(model, "-o", out, "--recipe", small, "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    return result.stdout, out


def test_a_pipe_gets_plain_lines(done, model):
    text, out = done
    assert verify(out) == [] and "\x1b" not in text
    assert not [line for line in text.splitlines() if line != line.rstrip()]
    lines = [line.split() for line in text.splitlines()]
    units = [line for line in lines if line and line[0] in ("embedding", "layer", "head")]
    assert [line[0] for line in units] == ["embedding", "layer", "layer", "head"]
    for name in ("layer 0", "layer 1"):
        assert re.search(rf"^{name} +[\d.]+ s +[\d.]+ % +[\d.]+ % +[\d.]+ [MG]B  \S+$", text, re.M), text
    for part in (
        f"{model} → {out}\n", "recipe       small", " kB → ", "bits a weight", "tiny, 256 tokens in windows of 64",
        "CPU  1 thread", "calibration: probing the router", "done in", "of a weight's output energy",
        "calibration tokens for the middle expert", f"  klquant verify {out}\n", f"  klquant inspect {out}\n",
        f"  klquant eval {out} --against {model} ",
    ):  # fmt: skip
        assert part in text, part


@pytest.mark.parametrize("there", [True, False])
def test_the_evaluation_to_copy_runs(done, model, tmp_path, monkeypatch, there):
    """With the default mix where its library is there, else on text that needs none."""
    monkeypatch.setattr("klquant.calibrate.documents.is_installed", lambda package: there)
    (line,) = _commands_after(model, done[1], "eval")
    assert line.split() == ["klquant", "eval", str(done[1]), "--against", str(model),
                            *([] if there else ["--data", "tiny"]), "-o", f"{done[1]}.json"]  # fmt: skip
    if not there:
        evaluate = CliRunner().invoke(main, [*shlex.split(line)[1:], "--windows", "1"], catch_exceptions=False)
        assert evaluate.exit_code == 0, evaluate.stderr


def test_what_has_no_tokenizer_or_a_space_in_its_name_is_said_so_that_it_runs(done, model, tmp_path):
    out = shutil.copytree(done[1], tmp_path / "my model")
    assert [shlex.split(line)[2] for line in _commands_after(model, out, "eval")] == [str(out)]
    (out / "tokenizer.json").unlink()
    assert _commands_after(model, out, "eval") == []


def _commands_after(model: Path, out: Path, name: str) -> list[str]:
    return [shlex.join(["klquant", *command]) for command in next_commands(str(model), out) if command[0] == name]


def test_a_run_is_gone_on_with(model, small, tmp_path, monkeypatch, done):
    monkeypatch.setattr("klquant.pipeline.streams.COPY_SHARE", 1e9)  # after every layer
    out = tmp_path / "out"
    args = (model, "-o", out, "--recipe", small, "--device", "cpu")
    with monkeypatch.context() as patch:
        patch.setattr("klquant.pipeline.run.Units.head", interrupt)
        result = quantize(*args)
    assert (result.exit_code, result.stderr) == (
        130, "klquant: interrupted: the same command with --resume goes on\n"
    )  # fmt: skip
    assert not out.exists() and unfinished(out).exists()
    result = quantize(*args)
    assert result.exit_code == 2 and "continue it with --resume" in result.stderr and result.stdout == ""
    result = quantize(*args, "--resume")
    assert result.exit_code == 0 and "going on: 3 of 4 units are done already" in result.stdout
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {p.name: p.read_bytes() for p in done[1].iterdir()}
    result = quantize(*args, "--resume")
    assert result.exit_code == 2 and "is finished already" in result.stderr


def interrupt(*_):
    raise KeyboardInterrupt


def test_an_interrupt_before_anything_is_written_says_so(model, small, tmp_path, monkeypatch):
    monkeypatch.setattr("klquant.pipeline.run.draw_text", interrupt)
    result = quantize(model, "-o", tmp_path / "out", "--recipe", small)
    assert (result.exit_code, result.stderr) == (130, "klquant: interrupted: nothing was written\n")


def heed_interrupts():
    """A shell starts what it puts in the background with interrupts ignored, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_a_real_interrupt_stops_a_real_process(model, small, tmp_path, done):
    """Ctrl-C as the terminal sends it, as soon as the first unit is reported."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "klquant.cli.main", "quantize", model, "-o", out, "--recipe", small]
    command += ["--calib-tokens", "65536"]  # long enough to be interrupted
    with subprocess.Popen(map(str, command), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
                          preexec_fn=heed_interrupts) as process:  # fmt: skip
        for line in process.stdout:
            if line.startswith("embedding"):
                process.send_signal(signal.SIGINT)
                break
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert error == "klquant: interrupted: the same command with --resume goes on\n"
    assert not out.exists() and unfinished(out).exists()


def test_other_calibration_than_the_recipes(model, small, tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("Plenty of words to calibrate on. " * 60)
    more = tmp_path / "more.jsonl"
    more.write_text(json.dumps({"text": "And quite a few more of them. " * 60}))
    result = quantize(model, "-o", tmp_path / "out", "--recipe", small, "--calib", words, "--calib", more,
                      "--calib-tokens", 160, "--window", 32, "--max-shard-size", "20kB")  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert f"{words},{more}, 160 tokens in windows of 32\n" in result.stdout
    made = json.loads((tmp_path / "out" / "klquant.json").read_text())
    assert [(s["name"], s["windows"]) for s in made["calibration"]["sources"]] == [("words", 3), ("more", 2)]
    assert made["calibration"]["coverage"] is None and made["calibration"]["window"] == 32
    assert made["purpose"]["shard_bytes"] == 20_000 and len(made["shards"]) > 4


def test_tokens_are_rounded_up_to_whole_windows_and_said(model, small, tmp_path):
    result = quantize(model, "-o", tmp_path / "out", "--recipe", small, "--calib-tokens", 100, "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    assert "tiny, 128 tokens in windows of 64\n" in result.stdout
    assert json.loads((tmp_path / "out" / "klquant.json").read_text())["calibration"]["windows"] == 2


def test_a_run_is_gone_on_with_by_the_number_that_was_shown(model, small, tmp_path, monkeypatch):
    """100 tokens are 128 in whole windows, and no other run."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("klquant.pipeline.run.finish", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        assert quantize(model, "-o", out, "--recipe", small, "--calib-tokens", 100).exit_code == 130
    assert quantize(model, "-o", out, "--recipe", small, "--calib-tokens", 128, "--resume").exit_code == 0


def test_rounding_says_that_it_needs_no_text(model, tmp_path):
    file = tmp_path / "round.yaml"
    file.write_text(recipe_text(ROUND))
    result = quantize(model, "-o", tmp_path / "out", "--recipe", file, "--calib", "nothing.txt")
    assert result.exit_code == 0
    assert "none: this recipe rounds each weight by itself; --calib is not used" in result.stdout
    assert "of a weight's own energy" in result.stdout


def test_what_a_target_changes_is_said(tmp_path):
    attention = WIDE["linear_attn_config"] | {"full_attn_layers": [2], "kda_layers": [1]}
    model = tiny_checkpoint(
        tmp_path / "model", **WIDE | {"num_hidden_layers": 2, "num_experts": 2, "linear_attn_config": attention}
    )
    result = quantize(model, "-o", tmp_path / "out", "--recipe", "rtn-int4", "--target", "vllm")
    assert result.exit_code == 0, result.stderr
    assert "vllm  keeps 3 tensors that the recipe quantizes" in result.stdout and verify(tmp_path / "out") == []


def test_experts_without_tokens_are_named_and_counted(model, small, tmp_path):
    copy = shutil.copytree(model, tmp_path / "model")
    change(copy, "model.layers.1.block_sparse_moe.gate.e_score_correction_bias",
           lambda bias: bias.index_fill(0, torch.tensor([2]), -100.0))  # fmt: skip
    result = quantize(copy, "-o", tmp_path / "out", "--recipe", small)
    assert result.exit_code == 0
    text = " ".join(result.stdout.split())
    assert "1 of 4 saw no token and use their layer's statistics: layer 1: 2" in text
    assert "fallback: model.layers.1.block_sparse_moe.experts.2.w" in text and "(and 2 more)" in text


# Bad input: a change to a copy of the model (or None), further arguments, and what the one line must say.


def change(model: Path, name: str, edit) -> None:
    for shard in model.glob("*.safetensors"):
        tensors = load_file(shard)
        if name in tensors:
            new = edit(tensors.pop(name))
            if new is not None:
                tensors[name] = new.contiguous()
            save_file(tensors, shard, metadata={"format": "pt"})


def edit_config(**changes):
    return lambda model: edit_json(model / "config.json", lambda config: config.update(changes))


def edit_index(edit):
    return lambda model: edit_json(model / INDEX, lambda index: edit(index["weight_map"]))


def drop(model):
    change(model, W1, lambda tensor: None)
    edit_index(lambda weight_map: weight_map.pop(W1))(model)


def double(model):
    first, second = sorted(model.glob("*.safetensors"))
    save_file(load_file(second) | {W1: load_file(first).get(W1, torch.zeros(32, 64))}, second)
    save_file(load_file(first) | {W1: torch.zeros(32, 64)}, first)


def truncate(model):
    shard = model / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])


def pickles_only(model):
    for file in (*model.glob("*.safetensors"), model / INDEX):
        file.unlink()
    (model / "pytorch_model.bin").touch()


def far_token(model):
    edit_json(model / "tokenizer.json", lambda tokenizer: tokenizer["model"]["vocab"].update(far=700))


def spoil(value):
    return lambda model: change(model, W1, lambda tensor: tensor.index_fill(0, torch.tensor([3]), value))


BAD = {
    "truncated shard": (truncate, [], r"model-00002-of-00002\.safetensors: truncated: tensor \S+ ends at byte"),
    "missing shard": (
        lambda m: (m / "model-00001-of-00002.safetensors").unlink(), [],
        r"model-00001-of-00002\.safetensors: cannot be read: No such file",
    ),
    "missing tensor": (drop, [], rf"model: tensor {W1} is missing"),
    "doubled tensor": (double, [], rf"tensor {W1} is also in"),
    "wrong shape": (
        lambda m: change(m, W1, lambda t: t[:, :-1]), [], rf"tensor {W1} has shape \[32, 63\], but config.json implies"
    ),
    "wrong dtype": (lambda m: change(m, W1, lambda t: t.int()), [], rf"tensor {W1} has dtype I32, expected BF16"),
    "NaN": (spoil(float("nan")), [], rf"\.safetensors: tensor {W1} holds NaN or infinite values"),
    "infinity": (spoil(float("-inf")), [], rf"\.safetensors: tensor {W1} holds NaN or infinite values"),
    "other architecture": (edit_config(model_type="llama"), [], r"config\.json: model_type is 'llama'"),
    "config against index": (edit_config(num_experts=3), [], r"has shape \[4, 64\], but config.json implies \[3, 64\]"),
    "no config": (lambda m: (m / "config.json").unlink(), [], r"config\.json: no such file"),
    "quantized already": (
        edit_config(quantization_config={}), [], r"config\.json: this checkpoint is quantized already"
    ),
    "leaving the folder": (
        edit_index(lambda weight_map: weight_map.update({W1: "../x.safetensors"})), [],
        r"'\.\./x\.safetensors' is not a plain file name",
    ),
    "pickles": (pickles_only, [], "holds pickled weights only; klquant reads safetensors only"),
    "group and width": (None, ["--recipe", "int4"], r"int4\.yaml:\d+: group_size 128 does not divide the 64 input"),
    "unknown recipe": (None, ["--recipe", "int5"], "unknown recipe 'int5'.*known: int3, int4, int4-all, int4-awq"),
    "unknown text": (None, ["--calib", "no.txt"], r"'no\.txt': no such file or folder, and no mix of that name"),
    "empty text": (None, ["--calib", "{tmp}/empty.txt"], r"too short: 0 tokens in 0 documents \(.*empty\.txt\)"),
    "short text": (None, ["--calib", "{tmp}/short.txt"], r"too short: 10 tokens in 1 documents .*one window needs 64"),
    "window and tokens": (None, ["--calib-tokens", "32"], "window of 64 tokens is longer than the 32 tokens"),
    "no tokenizer": (lambda m: (m / "tokenizer.json").unlink(), [], "tokenizer"),
    "token ids": (far_token, [], r"tokenizer\.json: token ids up to 700 lie beyond the model's vocabulary of 320"),
    "a GPU's memory on a CPU": (
        None, ["--max-gpu-memory", "20GiB"], "--max-gpu-memory: this run computes on the CPU; leave it out, or name"
    ),
    "too little memory": (None, ["--max-cpu-memory", "1kB"], "a layer takes about .* raise --max-cpu-memory"),
    "a size without a unit": (None, ["--max-cpu-memory", "24"], "'24' has no unit .* did you mean 24GiB"),
    "no CUDA": (None, ["--device", "cuda:7"], r"device cuda:7: \d CUDA device\(s\) found here; use cpu"),
    "a device twice": (None, ["--device", "cpu,cpu"], "devices cpu,cpu: one comes twice"),
    "expert groups": (edit_config(topk_group=5), [], r"config\.json: topk_group 5 exceeds num_expert_group 1"),
    "unknown device": (None, ["--device", "tpu"], "unknown device 'tpu'; use cpu, cuda or cuda:N"),
    "vllm and INT3": (
        None, ["--recipe", "{tmp}/int3.yaml", "--target", "vllm"], r"int3\.yaml:4: vLLM .* has no INT3 kernel"
    ),
    "no model": (None, ["nowhere"], r"nowhere: no such folder, and not a hub id"),
    "no model on the hub": (None, ["nobody/nothing"], "nobody/nothing: .*the hub cannot be reached"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(model, small, tmp_path, case):
    edit, args, message = BAD[case]
    copy = shutil.copytree(model, tmp_path / "model")
    if edit is not None:
        edit(copy)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("8 bytes.")
    (tmp_path / "int3.yaml").write_text(recipe_text(ROUND.splitlines()[1].replace("bits: 4", "bits: 3").join("\n\n")))
    args = [a.replace("{tmp}", str(tmp_path)) for a in args]
    named = [] if case.startswith("no model") else [copy]
    result = quantize(*named, "-o", tmp_path / "out", "--recipe", small, "--device", "cpu", *args)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("klquant: error: ") and result.stderr.count("\n") == 1
    assert re.search(message, result.stderr), result.stderr
    assert not (tmp_path / "out").exists() and not unfinished(tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("make", "args"),
    [(lambda out: out.write_text(""), []), (lambda out: (out.mkdir(), (out / "config.json").touch()), ["--resume"])],
)
def test_an_output_in_use_is_refused(model, small, tmp_path, make, args):
    make(tmp_path / "out")
    result = quantize(model, "-o", tmp_path / "out", "--recipe", small, *args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "out: exists and is not an empty folder" in result.stderr


def test_a_full_disk_does_not_stop_a_run_that_has_all_but_its_name(model, small, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert quantize(model, "-o", out, "--recipe", small).exit_code == 0
    out.rename(tmp_path / "out.unfinished")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("usage", (), {"free": 0}))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)  # nothing is computed any more
    result = quantize(model, "-o", out, "--recipe", small, "--resume")
    assert result.exit_code == 0 and (out / "config.json").exists(), result.stderr


def test_a_disk_too_small_is_refused_before_any_work(model, small, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("usage", (), {"free": 1000}))
    result = quantize(model, "-o", tmp_path / "a" / "out", "--recipe", small)
    assert (result.exit_code, result.stdout) == (2, "")
    # Two copies of two streams of 256 tokens × 64 values of FP32, and the tokens.
    match = rf"error: {tmp_path}: the result takes [\d.]+ kB and 264 kB for text and activations .* 1\.00 kB are free"
    assert re.search(match, result.stderr), result.stderr


@pytest.mark.parametrize("size", ["5 pounds", "0GB", "-1", ""])
def test_a_size_that_is_none_is_refused(model, tmp_path, size):
    result = quantize(model, "-o", tmp_path / "out", "--max-shard-size", size)
    assert result.exit_code == 2 and "--max-shard-size" in result.stderr
