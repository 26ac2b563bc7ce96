"""What is refused before the weights of a model on the hub are fetched: all that a slip of the keyboard can be."""

import json
import shutil
import sys

import pytest
from click.testing import CliRunner

from klquant.checkpoint.index import read_tensor_index
from klquant.cli.main import main
from tests.pipeline.build import recipe_text, short_model

HUB = "owner/name"
TEXT = ("--data", "tiny")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return short_model(tmp_path_factory.mktemp("short") / "model")


@pytest.fixture
def call(model, tmp_path, monkeypatch):
    """A command on a hub id whose small files are there and whose weights must not be asked for."""

    def resolve(name, weights):
        assert not weights, "weights were fetched"
        return model

    for module in ("klquant.cli.fetch", "klquant.checkpoint.hub"):
        monkeypatch.setattr(f"{module}.resolve_model", resolve)
        monkeypatch.setattr(f"{module}.read_hub_index", lambda name: read_tensor_index(model))
    monkeypatch.setattr("klquant.calibrate.documents.is_installed", lambda package: False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(recipe_text())
    (tmp_path / "mixed.yaml").write_text(recipe_text(text="calibration: {mix: default}"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    return lambda name, *args: CliRunner().invoke(main, [name, HUB, *args], prog_name="klquant", catch_exceptions=False)


QUANTIZE = ("quantize", "--recipe", "small.yaml")
SWEEP = ("sweep", "--recipes", "small.yaml", "--device", "cpu")


@pytest.mark.parametrize(("args", "message"), [
    ((*QUANTIZE, "-o", "mine"), "mine: exists and is not an empty folder"),
    ((*QUANTIZE, "-o", "out", "--calib", "no.txt"), "text 'no.txt': no such file"),
    (("quantize", "--recipe", "mixed.yaml", "-o", "out"), "mixed.yaml:8: mix 'default', source 'chat' needs the dat"),
    (("eval", "-o", "mine"), "mine: not a file in a folder that exists"),
    (("eval", "-o", "r.json", "--data", "no.txt"), "text 'no.txt': no such file"),
    (("eval", "-o", "r.json"), "source 'chat' needs the datasets library: pip install 'klquant[data]', or pass --data"),
    (("eval", "-o", "r.json", *TEXT, "--tasks", "gsm8k"), "pip install 'klquant[tasks]'"),
    (("sensitivity", "-o", "mine"), "mine: not a file in a folder that exists"),
    (("sensitivity", "-o", "r.json"), "needs the datasets library"),
    (("sensitivity", "-o", "r.json", *TEXT, "--quantized", "no"), "no: no such folder"),
    ((*SWEEP, "-o", "mine", *TEXT), "mine: is neither empty nor a sweep's"),
    ((*SWEEP, "-o", "mine/file/x", *TEXT), "mine/file/x: cannot be created: "),
    ((*SWEEP, "-o", "out", *TEXT, "--calib", "no.txt"), "text 'no.txt': no such file"),
    ((*SWEEP, "-o", "out"), "needs the datasets library"),
])  # fmt: skip
def test_what_can_be_said_before_weights_come_is(call, args, message, tmp_path):
    done = call(*args)
    assert done.exit_code == 2 and message in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()


def test_another_sweeps_folder_is_told_by_its_settings(call, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sweep.json").write_text(json.dumps({"weights": "x", "data": "default", "windows": 8}))
    done = call(*SWEEP, "-o", "out", *TEXT, "--windows", "3")
    assert done.exit_code == 2 and "--data was default, now tiny; --windows was 8, now 3; " in done.stderr
    assert "other weights" not in done.stderr


def test_a_disk_too_small_is_told_from_the_index(call, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("usage", (), {"free": 1000}))
    done = call(*QUANTIZE, "-o", "out")
    assert done.exit_code == 2 and "but only 1.00 kB are free" in done.stderr
