import json
import re
import time

import pytest
from click.testing import CliRunner

from klquant.cli.main import main
from klquant.cli.render import count
from klquant.core.units import decimal, tokens
from tests.recipe.build import INT4, WIDE, text
from tests.tiny import tiny_checkpoint


def run(*args: str):
    return CliRunner().invoke(main, ["plan", *map(str, args)], prog_name="klquant", catch_exceptions=False)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A tiny checkpoint with weights whose shapes take groups of 128."""
    return tiny_checkpoint(tmp_path_factory.mktemp("wide") / "model", **WIDE)


def test_a_checkpoint_is_planned_with_every_class_and_reason(wide):
    result = run(wide)
    assert result.exit_code == 0, result.stderr
    for word in ("routed_experts", "kda_gates", "embedding", "GPTQ", "keep", "most of the weights", "whole model",
                 "always active", "read a token", "Memory to run", "4 k", "12 · 16 · 24"):  # fmt: skip
        assert word in result.stdout, word
    assert "Changed for" not in result.stdout


@pytest.mark.parametrize("width", [80, 100, 140])
def test_no_line_is_wider_than_the_terminal_and_nothing_is_cut(wide, monkeypatch, width):
    monkeypatch.setattr("klquant.cli.render.PIPE_WIDTH", width)
    lines = run(wide, "--target", "vllm").stdout.splitlines()
    assert max(map(len, lines)) <= width
    assert not any("…" in line for line in lines)


def test_a_narrow_terminal_breaks_lines_and_cuts_no_figure(wide, monkeypatch):
    monkeypatch.setattr("klquant.cli.render.PIPE_WIDTH", 100)
    sizes = re.findall(r"\d\S* [kM]?B", run(wide).stdout)
    monkeypatch.setattr("klquant.cli.render.PIPE_WIDTH", 40)
    assert re.findall(r"\d\S* [kM]?B", run(wide).stdout) == sizes


def test_what_a_target_changes_is_shown_with_its_cost(wide):
    out = run(wide, "--target", "vllm").stdout
    assert "Changed for vllm" in out and "kda_proj q_proj, k_proj, v_proj: 9 tensors kept instead of INT8 g128" in out
    assert " larger. vLLM 0.33 fuses" in " ".join(out.split())


def test_the_json_has_a_stable_shape(wide):
    out = json.loads(run(wide, "--json", "--target", "vllm").stdout)
    assert out["schema"] == 1
    assert list(out) == [
        "schema", "klquant", "model", "recipe", "target", "digest", "needs_calibration", "tensors", "totals",
        "bits_per_weight", "memory", "changes",
    ]  # fmt: skip
    assert list(out["tensors"][0]) == [
        "class", "roles", "layers", "tensors", "weights", "kept", "dtypes", "scheme", "algorithm", "bytes_before",
        "bytes_after", "why",
    ]  # fmt: skip
    assert out["tensors"][0]["scheme"] == {"bits": 4, "group_size": 128, "symmetric": True}
    assert list(out["totals"]) == ["tensors", "weights", "bytes_before", "bytes_after", "bytes_read_per_token"]
    assert sum(row["bytes_after"] for row in out["tensors"]) == out["totals"]["bytes_after"]
    assert sum(row["tensors"] for row in out["tensors"]) == out["totals"]["tensors"]
    assert list(out["bits_per_weight"]) == ["routed_experts", "always_active", "whole"]
    assert list(out["memory"][0]) == [
        "context", "sequences", "cache_bits", "embedding_on_cpu", "weights", "latent_cache", "kda_state",
        "workspace_estimate", "runtime_estimate", "total", "fits",
        "fits_with_experts_on_host",
    ]  # fmt: skip
    assert list(out["changes"][0]) == ["class", "roles", "tensors", "wanted", "why", "extra_bytes"]


def test_a_users_recipe_is_used_and_its_errors_carry_the_line(wide, tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text(text(f"{{tensors: mla_proj, {INT4}}}"))
    out = json.loads(run(wide, "--recipe", mine, "--json").stdout)
    assert [row["class"] for row in out["tensors"] if not row["kept"]] == ["mla_proj"]
    mine.write_text(text("{tensors: mla_prj, keep: true, why: w}"))
    result = run(wide, "--recipe", mine)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"klquant: error: {mine}:4: tensors: unknown tensor class 'mla_prj'")
    assert result.stderr.count("\n") == 1


def test_text_that_a_recipe_misspells_is_named_by_its_line(wide, tmp_path):
    recipe = tmp_path / "mine.yaml"
    rule = f"{{tensors: mla_proj, {INT4.replace('rtn', 'gptq')}}}"
    recipe.write_text(text(rule, tail="calibration:\n  mix: defualt\n"))
    result = run(wide, "--recipe", recipe)
    assert result.exit_code == 2 and "mine.yaml:6: text 'defualt': no such file" in result.stderr


def test_a_split_class_shows_which_part_a_row_is(wide, tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text(text(f"{{tensors: routed_experts, {INT4}}}",
                         "{tensors: routed_experts, roles: w2, layers: 1-2, keep: true, why: tender}"))  # fmt: skip
    out = run(wide, "--recipe", mine).stdout
    assert "\n  w2 " in out and "\n  layers 1-2 " in out and "tender" in out


def test_a_group_too_large_for_the_model_is_refused(tiny):
    result = run(tiny)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("klquant: error: int4.yaml:")
    assert ": group_size 128 does not divide the 64 input features of" in result.stderr


@pytest.mark.parametrize(
    ("model", "message"),
    [("none", "no such file"), ("./none/none", "no such file"), ("", "no such file")],
)
def test_a_folder_that_is_not_there_is_one_line(model, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(model)
    assert result.exit_code == 2 and message in result.stderr and result.stderr.count("\n") == 1


def test_a_hub_id_without_network_is_one_line():
    result = run("nobody/nothing-of-this-name")
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert "nobody/nothing-of-this-name: no such folder here, and the hub cannot be reached" in result.stderr


def test_the_48b_is_planned_within_five_seconds(kimi_48b):
    start = time.process_time()  # the machine may be busy with other things
    result = run(kimi_48b)
    assert time.process_time() - start < 5
    flat = " ".join(result.stdout.split())
    assert "routed_experts 19,968 4 128 GPTQ 94.2 GB 24.3 GB" in flat
    assert "whole model 20,493 98.2 GB 26.8 GB" in flat
    assert "1 M 24.24 3.96 0.04" in flat


def test_units():
    assert [decimal(n) for n in (0, 999, 1000, 9_996, 12_345, 999_499, 999_500, 24_291_631_104)] == [
        "0 B", "999 B", "1.00 kB", "10.0 kB", "12.3 kB", "999 kB", "1.00 MB", "24.3 GB",
    ]  # fmt: skip
    assert [count(n) for n in (7, 61_700_000, 49_123_456_789)] == ["7", "61.70 M", "49.12 B"]
    assert [tokens(n) for n in (1000, 8_192, 131_072, 1 << 20)] == ["1,000", "8 k", "128 k", "1 M"]
