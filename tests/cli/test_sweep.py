"""`klquant sweep` through the command line: what it leaves, what it does not do twice, what it refuses."""

import json

import pytest
import torch
from click.testing import CliRunner

import klquant.evaluate.run as evaluation
import klquant.pipeline.run as pipeline
from klquant.checkpoint.verify import verify
from klquant.cli.main import main
from klquant.evaluate.passes import Passes
from klquant.evaluate.result import load_result
from tests.pipeline.build import ROUND, RULES, digests, recipe_text, short_model


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
def recipes(tmp_path_factory):
    """Two recipes as files, one of them calibrated, in the form the option takes."""
    folder = tmp_path_factory.mktemp("recipes")
    for name, rules in (("small", RULES), ("rounded", ROUND)):
        (folder / f"{name}.yaml").write_text(recipe_text(rules).replace("name: small", f"name: {name}"))
    return [str(folder / f"{name}.yaml") for name in ("rounded", "small")]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for name in ("a", "b"):
        (folder / f"{name}.jsonl").write_text(json.dumps({"text": f"The quick brown fox {name} " * 20}) + "\n")
    return folder


@pytest.fixture
def sweep(model, texts):
    def call(out, recipes, *args: object):
        data = [] if "--data" in args else ["--data", texts]
        command = ["sweep", model, "--recipes", ",".join(recipes), "-o", out, *data, "--window", 64, "--windows", 2,
                   "--device", "cpu", *args]  # fmt: skip
        return CliRunner().invoke(main, list(map(str, command)), prog_name="klquant", catch_exceptions=False)

    return call


@pytest.fixture
def undrawn(monkeypatch):
    """Without the page, whose plots take longer than everything else here."""
    monkeypatch.setattr("klquant.report.page.html", lambda comparison: "")


@pytest.fixture
def passes(monkeypatch):
    """Counts what is computed: windows of passes by stage, and runs of quantize."""
    counts: dict[str, int] = {}
    run, quantize = Passes._pass, pipeline.quantize

    def counted(self, reader, dtype, folder, make, stage):
        counts[stage] = counts.get(stage, 0) + (windows := run(self, reader, dtype, folder, make, stage))
        return windows

    def made(*args):
        counts["quantize"] = counts.get("quantize", 0) + 1
        return quantize(*args)

    monkeypatch.setattr(Passes, "_pass", counted)
    monkeypatch.setattr(pipeline, "quantize", made)
    return counts


def test_checkpoints_results_and_report_are_there_after_one_reference_pass(sweep, recipes, passes, tmp_path):
    out = tmp_path / "deep" / "sweep"
    done = sweep(out, recipes)
    assert done.exit_code == 0, done.stderr
    assert "nothing to resume" not in done.stdout + done.stderr
    assert passes == {"quantize": 2, "reference": 4, "floor, bfloat16": 4, "model": 8}
    for name in ("rounded", "small"):
        assert verify(out / "models" / name) == []
        assert load_result(out / "results" / f"{name}.json").floor is not None
        assert name in done.stdout
    assert (out / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert (out / "report.md").exists()
    assert [v["name"] for v in json.loads((out / "report.json").read_text())["variants"]]


def test_finished_variants_are_skipped_and_new_recipes_added(sweep, undrawn, recipes, passes, tmp_path):
    assert sweep(tmp_path, recipes[:1]).exit_code == 0
    before = digests(tmp_path / "models")
    passes.clear()
    assert sweep(tmp_path, recipes).exit_code == 0
    assert passes == {"quantize": 1, "reference": 0, "floor, bfloat16": 0, "model": 4}
    assert before.items() <= digests(tmp_path / "models").items()
    passes.clear()
    assert sweep(tmp_path, recipes).exit_code == 0
    assert passes == {}


def test_an_interrupted_sweep_goes_on_to_the_same_bytes(sweep, undrawn, recipes, monkeypatch, tmp_path):
    assert sweep(tmp_path / "whole", recipes).exit_code == 0
    record, commits = pipeline.Journal.commit, []

    def interrupt(self, unit, *args):
        record(self, unit, *args)
        commits.append(unit)
        if len(commits) == 5:  # within the second recipe
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.Journal, "commit", interrupt)
        stopped = sweep(tmp_path / "broken", recipes)
    assert (stopped.exit_code, stopped.stderr.splitlines()[-1]) == (
        130, "klquant: interrupted: the same command goes on")  # fmt: skip
    assert sweep(tmp_path / "broken", recipes).exit_code == 0
    assert digests(tmp_path / "broken" / "models") == digests(tmp_path / "whole" / "models")


def test_baselines_are_judged_once_and_in_the_report(sweep, undrawn, recipes, passes, tmp_path):
    done = sweep(tmp_path, recipes[1:], "--baselines", "rtn")
    assert done.exit_code == 0, done.stderr
    assert passes == {"quantize": 1, "reference": 4, "floor, bfloat16": 4, "model": 8}
    (file,) = (tmp_path / "results").glob("baseline-rtn-*.json")
    assert load_result(file).model.baseline.recipe == "small" and "RTN of small, a baseline, 2 of 2" in done.stdout
    variants = json.loads((tmp_path / "report.json").read_text())["variants"]
    assert {v["name"]: v["baseline"] for v in variants} == {"small": False, "RTN of small": True}
    passes.clear()
    assert sweep(tmp_path, recipes[1:], "--baselines", "rtn").exit_code == 0
    assert passes == {}


def test_an_unknown_baseline_is_refused_before_any_work(sweep, recipes, tmp_path):
    done = sweep(tmp_path / "out", recipes, "--baselines", "rtn,nf5")
    assert done.exit_code == 2 and "unknown 'nf5'; known: rtn, nf4" in done.stderr and not (tmp_path / "out").exists()


def test_a_checkpoint_made_anew_is_judged_anew(sweep, undrawn, recipes, passes, tmp_path):
    assert sweep(tmp_path, recipes[:1]).exit_code == 0
    file = tmp_path / "results" / "rounded.json"
    file.write_text(file.read_text().replace(load_result(file).model.fingerprint, "0" * 64))
    passes.clear()
    assert sweep(tmp_path, recipes[:1]).exit_code == 0
    assert passes["model"] == 4 and "quantize" not in passes


def test_a_folder_of_another_sweep_is_refused_by_what_differs(sweep, undrawn, recipes, tmp_path):
    assert sweep(tmp_path, recipes[:1]).exit_code == 0
    for args, what in (
        (("--windows", 3), "--windows was 2, now 3"),
        (("--calib", "tiny"), "--calib was not given, now tiny"),
        (("--dtype", "bfloat16"), "--dtype was not given, now bfloat16"),
    ):
        done = sweep(tmp_path, recipes[:1], *args)
        assert done.exit_code == 2 and f"another sweep is there ({what}); repeat" in done.stderr


def test_a_checkpoint_is_no_folder_for_a_sweep(sweep, recipes, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    done = sweep(tmp_path, recipes[:1])
    assert done.exit_code == 2 and "is a checkpoint" in done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


def test_files_that_are_not_a_sweeps_stay(sweep, recipes, tmp_path):
    (tmp_path / "report.md").write_text("mine")
    done = sweep(tmp_path, recipes[:1])
    assert done.exit_code == 2 and "is neither empty nor a sweep's" in done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["report.md"]


@pytest.mark.parametrize("option", ["--data", "--calib"])
def test_text_that_is_not_there_claims_no_folder(sweep, recipes, option, tmp_path):
    done = sweep(tmp_path / "out", recipes[:1], option, "nope.txt")
    assert done.exit_code == 2 and "'nope.txt': no such file" in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["[]", "{"])
def test_damaged_settings_are_named(sweep, recipes, text, tmp_path):
    (tmp_path / "sweep.json").write_text(text)
    done = sweep(tmp_path, recipes[:1])
    assert done.exit_code == 2 and "sweep.json: not " in done.stderr and done.stderr.count("\n") == 1


def test_a_folder_that_cannot_be_made_is_named(sweep, recipes, tmp_path):
    (tmp_path / "file").touch()
    done = sweep(tmp_path / "file" / "out", recipes[:1])
    assert done.exit_code == 2 and "file/out: cannot be created: " in done.stderr


def test_a_baseline_that_a_recipe_is_already_is_said(sweep, undrawn, recipes, tmp_path):
    done = sweep(tmp_path, recipes[:1], "--baselines", "rtn")
    assert done.exit_code == 0 and "no baseline rtn" in done.stdout


def test_a_changed_recipe_is_refused_while_its_old_checkpoint_is_there(sweep, undrawn, recipes, tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text(recipe_text(ROUND))
    assert sweep(tmp_path / "out", [str(mine)]).exit_code == 0
    mine.write_text(recipe_text(ROUND.replace("bits: 4", "bits: 3")))
    done = sweep(tmp_path / "out", [str(mine)])
    assert done.exit_code == 2 and "models/small: made by another recipe" in done.stderr


@pytest.mark.parametrize(
    ("recipes", "message"), [(["int4", "int4"], "'int4' comes twice"), ([""], "names no recipe"), (["int5"], "int5")]
)
def test_recipes_are_checked_before_any_work(sweep, recipes, message, tmp_path):
    done = sweep(tmp_path / "out", recipes)
    assert done.exit_code == 2 and message in done.stderr and not (tmp_path / "out").exists()


def test_too_little_room_is_said_before_any_work(sweep, recipes, monkeypatch, tmp_path):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    done = sweep(tmp_path, recipes)
    assert done.exit_code == 2 and "the 2 variants to make take" in done.stderr
    assert not list(tmp_path.iterdir())


def test_evaluation_is_the_one_of_eval():
    """The sweep's defaults are eval's, by reference and not by copy."""
    options = {p.name: p.default for p in main.get_command(None, "sweep").params}
    assert (options["windows"], options["window"]) == (evaluation.EvalOptions.windows, evaluation.EvalOptions.window)
