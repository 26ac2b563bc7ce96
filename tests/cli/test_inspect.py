"""`klquant inspect`: our results, other tools' checkpoints, and the 16-bit original."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from klquant.checkpoint.index import PROVENANCE
from klquant.cli.findings import quantiles
from klquant.cli.main import main
from klquant.core.spec import WeightSpec
from tests.checkpoint.build import INT8, edit_json, int4_rule, quantized_checkpoint
from tests.pipeline.build import run
from tests.tiny import tiny_checkpoint, tiny_config

GROUPS = {WeightSpec(bits=4, group_size=32): "INT4 g32", INT8: "INT8 g32"}


def inspect(*args):
    return CliRunner().invoke(main, ["inspect", *map(str, args)], prog_name="klquant", catch_exceptions=False)


def ok(*args) -> str:
    result = inspect(*args)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def as_json(*args) -> dict:
    return json.loads(ok(*args, "--json"))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A result of `klquant quantize`, of a model with four layers."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("made")
    run(tiny_checkpoint(folder / "model"), folder / "out")
    torch.set_num_threads(before)
    return folder / "out"


@pytest.fixture
def copy(made, tmp_path) -> Path:
    return shutil.copytree(made, tmp_path / "out")


def test_everything_in_one_page(made):
    text = ok(made)
    flat = " ".join(text.split())
    for part in ("recipe small · target klquant", "calibrated on", "(tiny ", "routed_experts 72 INT4 g32 4.56",
                 "kda_gates 6 F32 32.000", "all 151", "Worst tensors",
                 "layer none least 1 % 10 % median 90 % most", "No fallbacks."):  # fmt: skip
        assert part in flat, part
    assert "head" in text and max(map(len, text.splitlines())) <= 100


def test_one_window_is_one(copy):
    edit_json(copy / PROVENANCE, lambda made: made["calibration"].update(windows=1, window=64))
    assert "calibrated on 64 tokens: 1 window of 64 " in ok(copy)


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("args", [[], ["--layer", "3"], ["--class", "mla_proj"]])
def test_nothing_is_cut_or_too_wide(made, monkeypatch, width, args):
    monkeypatch.setattr("klquant.cli.render.PIPE_WIDTH", width)
    text = ok(made, *args)
    assert max(map(len, text.splitlines())) <= width and "…" not in text


def test_the_json_agrees_with_the_record(made):
    out, record = as_json(made), json.loads((made / PROVENANCE).read_text())
    assert list(out) == [
        "schema", "folder", "files", "missing_tensors", "weights", "bytes", "stored", "errors", "worst",
        "expert_tokens", "fallbacks", "provenance",
    ]  # fmt: skip
    assert out["files"] == 6 and out["missing_tensors"] == 0
    index = json.loads((made / "model.safetensors.index.json").read_text())
    assert out["bytes"] == index["metadata"]["total_size"] == sum(row["bytes"] for row in out["stored"])
    assert sum(row["tensors"] for row in out["errors"]) == len(record["tensors"])
    worst = max(record["tensors"], key=lambda module: record["tensors"][module]["error"])
    assert out["worst"][0]["tensor"] == f"{worst}.weight" and len(out["worst"]) == 8
    tokens = record["expert_tokens"]["2"]
    assert out["expert_tokens"][1]["layer"] == 2 and out["expert_tokens"][1]["most"] == max(tokens)
    assert out["provenance"]["recipe"] == "small" and out["provenance"]["calibration"]["window"] == 64


def test_one_layer_role_by_role(made):
    out, text = as_json(made, "--layer", "1"), ok(made, "--layer", "1")
    assert {row["layer"] for row in out["errors"]} == {1} and len(out["expert_tokens"]) == 1
    assert "shared_experts gate_proj" in " ".join(text.split()) and "layer 1, expert (tokens): " in text
    assert "embedding" not in text


def test_one_class_layer_by_layer(made):
    out, text = as_json(made, "--class", "kda_proj"), ok(made, "--class", "kda_proj")
    assert {row["class"] for row in out["stored"]} == {"kda_proj"} and out["expert_tokens"] == []
    assert " mean " in text and text.count(" KDA ") == 3
    assert as_json(made, "--class", "routed_experts", "--layer", "2")["stored"][0]["tensors"] == 24


def test_what_is_not_there_is_refused(made, tmp_path):
    for args, message in (
        ([made, "--layer", "4"], "there is no layer 4; layers count from 0 to 3"),
        ([made, "--layer", "0", "--class", "routed_experts"], "layer 0 has no tensor of routed_experts"),
        ([tmp_path / "none"], "none: no such folder"),
        ([tmp_path], "config.json: no such file"),
    ):
        result = inspect(*args)
        assert (result.exit_code, result.stdout) == (2, "") and result.stderr.count("\n") == 1
        assert message in result.stderr
    assert inspect(made, "--class", "expert").exit_code == 2


def test_a_checkpoint_of_another_tool(tmp_path):
    """Other layers, other grids, no klquant.json: what is stored is told all the same."""
    quantized_checkpoint(tmp_path / "other", tiny_config(), lambda key: INT8 if key.role == "w2" else int4_rule(key))
    (tmp_path / "other" / PROVENANCE).unlink()
    out, text = as_json(tmp_path / "other"), ok(tmp_path / "other")
    assert out["provenance"] is None and out["errors"] == [] and out["expert_tokens"] == []
    stored = {(row["class"], row["stored"]): row["tensors"] for row in out["stored"]}
    assert stored["routed_experts", "INT4 g32"] == 48 and stored["routed_experts", "INT8 g32"] == 24
    assert "no klquant.json" in text and "Error" not in text and "allbacks" not in text


def test_the_original(tiny):
    out = as_json(tiny)
    assert {row["stored"] for row in out["stored"]} == {"BF16", "F32"} and out["provenance"] is None
    assert "routed_experts 72 BF16 16.000" in " ".join(ok(tiny).split())


def test_missing_tensors_are_counted(copy):
    shard = copy / "model-00006-of-00006.safetensors"
    edit_json(copy / "model.safetensors.index.json", lambda index: index.update(
        weight_map={name: file for name, file in index["weight_map"].items() if file != shard.name}))  # fmt: skip
    shard.unlink()
    assert as_json(copy)["missing_tensors"] == 4
    assert "4 tensors are missing: klquant verify names them" in ok(copy)


def test_fallbacks_and_experts_without_tokens(copy):
    module = "model.layers.2.block_sparse_moe.experts.5.w1"

    def spoil(record):
        record["tensors"][module]["fallback"] = "no token reached it"
        record["expert_tokens"]["2"][5] = 0

    edit_json(copy / PROVENANCE, spoil)
    text = ok(copy)
    assert f"Fallbacks: 1\n  {module}: no token reached it" in text
    assert as_json(copy)["expert_tokens"][1]["unseen"] == [5]


def test_what_stands_out_is_marked(copy):
    def spoil(record):
        for module, entry in record["tensors"].items():
            entry["error"] = 0.03 if module.startswith("model.layers.2.self_attn") else 0.001

    edit_json(copy / PROVENANCE, spoil)
    text = ok(copy)
    assert text.count("▲ 3.00") == 1 and "▲ 2 times the median of its column or more" in text


def test_what_a_target_changed(copy):
    change = {"class": "kda_proj", "roles": ["q_proj"], "count": 3, "why": "it fuses them", "extra_bytes": 9}
    edit_json(copy / PROVENANCE, lambda record: record.update(target="vllm", changes=[change]))
    assert "for vllm kda_proj q_proj: 3 tensors kept. it fuses them." in ok(copy)


@pytest.mark.parametrize("text", ["{", "[]", '{"shards": {}}', '{"tensors": {"lm_head": {"error": "high"}}}'])
def test_a_broken_record_is_one_line(copy, text):
    (copy / PROVENANCE).write_text(text)
    result = inspect(copy)
    assert result.exit_code == 2 and result.stderr.count("\n") == 1 and f"{PROVENANCE}: " in result.stderr


@pytest.mark.parametrize(
    ("key", "value", "place"),
    [
        ("calibration", {"sources": [{}], "windows": 1, "window": 2}, "calibration.sources.0.name"),
        ("calibration", {"sources": [], "windows": {}, "window": 2}, "calibration.windows"),
        ("changes", [{"class": "head", "roles": [], "count": 1}], "changes.0.why"),
        ("expert_tokens", {"x": []}, "expert_tokens.x"),
    ],
)
def test_a_record_of_another_form_is_named_by_its_place(copy, key, value, place):
    edit_json(copy / PROVENANCE, lambda record: record.update({key: value}))
    result = inspect(copy)
    assert result.exit_code == 2 and result.stderr.count("\n") == 1 and f"{PROVENANCE}: {place}" in result.stderr


def test_quantiles_are_counts_that_occurred():
    assert quantiles([0, 5, 1, 9]) == {"none": 1, "least": 0, "p1": 0, "p10": 0, "median": 1, "p90": 5, "most": 9}
    assert quantiles(list(range(101)))["p90"] == 90
