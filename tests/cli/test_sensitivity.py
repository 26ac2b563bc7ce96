import json

import pytest
import torch
from click.testing import CliRunner

from klquant.cli.main import main
from klquant.evaluate.sensitivity_result import load_sensitivity
from tests.pipeline.build import ROUND, recipe, recipe_text, run, short_model


def call(*args: object):
    return CliRunner().invoke(main, ["sensitivity", *map(str, args)], prog_name="klquant", catch_exceptions=False)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return short_model(tmp_path_factory.mktemp("short") / "model")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A recipe file and text."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "small.yaml").write_text(recipe_text(ROUND))
    (folder / "a.jsonl").write_text(json.dumps({"text": "The quick brown fox jumped over it. " * 20}) + "\n")
    return folder


@pytest.fixture
def args(model, work, tmp_path):
    return model, "--data", work / "a.jsonl", "--windows", 1, "--window", 64, "-o", tmp_path / "s.json"


def test_a_table_is_shown_and_the_same_command_goes_on(args, work, tmp_path, monkeypatch):
    monkeypatch.setattr("klquant.cli.render.PIPE_WIDTH", 80)
    first = call(*args, "--recipe", work / "small.yaml", "--minutes", 0)
    assert first.exit_code == 0, first.stderr
    assert "no time was left for: routed_experts w1 w3" in first.stdout
    assert [line.split(": ")[0] for line in first.stderr.splitlines()] == ["reference", "1 of 9"]
    done = call(*args, "--recipe", work / "small.yaml")
    stages = [line.split(": ")[1] for line in done.stderr.splitlines()]
    assert stages[0] == "routed_experts w1 w3" and len(stages) == 8 and "no time was left" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    result = load_sensitivity(tmp_path / "s.json")
    rows = {line[:22].strip(): line[22:].split() for line in done.stdout.splitlines()}
    for entry in result.entries:
        cells = rows[entry.part.name.replace("_", " ")]
        assert f"{entry.overall.kld.mean:.5f}" in cells
    assert rows["head"][:2] == ["INT8", "g32"]


def test_a_quantized_checkpoint_by_layer_as_json(args, model, work, tmp_path):
    run(model, tmp_path / "int4", recipe(ROUND))
    done = call(*args, "--quantized", tmp_path / "int4", "--by", "layer", "--json")
    assert json.loads(done.stdout) == json.loads((tmp_path / "s.json").read_text())
    assert {e["part"]["name"] for e in json.loads(done.stdout)["entries"]} == {
        "everything", "layer 0", "layer 1", "head"}  # fmt: skip


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--recipe", "int5"), "unknown recipe 'int5'"),
        (("--recipe", "int4", "--quantized", "x"), "exclude each other"),
        (("--quantized", "none"), "none"),
        (("--minutes", "nan"), "--minutes is no number of minutes"),
        (("--recipe", "int4"), "group_size 128 does not divide the 64 input features"),
        (("--device", "cuda:9"), "cuda:9"),
    ],
)
def test_what_a_user_can_mend_is_one_line_and_exit_2(args, tmp_path, more, message):
    done = call(*args, *more)
    assert done.exit_code == 2 and message in done.stderr.splitlines()[-1]
    assert not (tmp_path / "s.json").exists()
