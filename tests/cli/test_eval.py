import json
import sys

import pytest
from click.testing import CliRunner

from klquant.cli.main import main
from klquant.evaluate.result import load_result
from tests.pipeline.build import recipe_text
from tests.tiny import tiny_checkpoint


def run(*args: object):
    return CliRunner().invoke(main, ["eval", *map(str, args)], prog_name="klquant", catch_exceptions=False)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for name in ("a", "b"):
        (folder / f"{name}.jsonl").write_text(json.dumps({"text": f"The quick brown fox {name} " * 20}) + "\n")
    return folder


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("other") / "model", seed=1)


def test_a_result_is_written_and_shown(tiny, other, texts, tmp_path, monkeypatch):
    monkeypatch.setattr("klquant.cli.render.PIPE_WIDTH", 80)
    out = tmp_path / "r.json"
    done = run(other, "--against", tiny, "--data", texts, "--window", 64, "--windows", 2, "--floor", "-o", out)
    assert done.exit_code == 0, done.stderr
    result = load_result(out)
    assert list(result.domains) == ["a", "b"] and result.floor is not None
    assert max(map(len, done.stdout.splitlines())) <= 80
    rows = {line.split()[0]: line.split() for line in done.stdout.splitlines() if line.strip()}
    assert rows["all"][1:3] == ["256", f"{result.overall.kld.mean:.4f}"]
    assert rows["floor"][2] == f"{result.floor.overall.kld.mean:.4f}"
    assert "256 tokens" in done.stdout and "bits a weight" in done.stdout
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == ["reference", "floor, bfloat16", "model"]


def test_json_is_the_file(tiny, texts, tmp_path):
    files = [part for name in ("b", "a") for part in ("--data", texts / f"{name}.jsonl")]
    done = run(tiny, *files, "--window", 64, "--windows", 1, "-o", tmp_path / "r.json", "--json")
    assert json.loads(done.stdout) == json.loads((tmp_path / "r.json").read_text())
    assert list(json.loads(done.stdout)["domains"]) == ["b", "a"]


def test_without_a_reference_the_table_has_perplexity(tiny, texts, tmp_path):
    done = run(tiny, "--data", texts, "--window", 64, "--windows", 1, "-o", tmp_path / "r.json")
    assert "perplexity" in done.stdout and "KLD" not in done.stdout


def test_a_baseline_is_judged_against_the_model_itself(tiny, texts, tmp_path):
    (tmp_path / "small.yaml").write_text(recipe_text())
    out = tmp_path / "r.json"
    text = ("--data", texts, "--window", 64, "--windows", 1)
    done = run(tiny, "--as", "rtn", "--recipe", tmp_path / "small.yaml", *text, "--floor", "-o", out)
    assert done.exit_code == 0, done.stderr
    result = load_result(out)
    assert result.model.baseline.title == "RTN of small" and result.floor is not None
    assert done.stdout.startswith(f"RTN of {tiny}")


def test_tasks_are_shown_beside_the_references(tiny, other, texts, tmp_path, monkeypatch):
    monkeypatch.setattr("klquant.cli.render.PIPE_WIDTH", 80)
    monkeypatch.setattr("klquant.evaluate.tasks.needle.LENGTHS", (900,))
    out = tmp_path / "r.json"
    asked = ("--tasks", "needle_multikey, needle_single", "--task-limit", 3, "--task-seed", 7)
    done = run(other, "--against", tiny, "--data", texts, "--window", 64, "--windows", 1, *asked, "-o", out)
    assert done.exit_code == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    first = load_result(out).tasks[0]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("needle_multikey acc")]
    assert line.split()[2:] == [
        "3", f"{first.value:.4f}", f"{first.standard_error:.4f}", "0.125", f"{first.reference.value:.4f}",
        f"{first.difference.mean:+.4f}", f"{first.difference.standard_error:.4f}",
    ]  # fmt: skip
    assert first.seed == 7 and "needle_single, reference" in done.stderr


def test_without_lm_eval_its_tasks_say_what_to_install(tiny, texts, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    done = run(tiny, "--data", texts, "--window", 64, "--tasks", "gsm8k", "-o", tmp_path / "r.json")
    assert done.exit_code == 2
    assert "pip install 'klquant[tasks]'; of klquant's own there is needle, " in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("-o", "{mine}"), "mine.txt: is there already and no result of klquant eval"),
        (("-o", "{parts}"), "parts.json: is there already and no result of klquant eval"),
        (("--data", "none.jsonl"), "none.jsonl"),
        (("--against", "none"), "none"),
        (("--data", "self"), "'self' is for calibration only; give text files or a mix (known: tiny, default)"),
        (("--data", "tiny"), "--data: 'tiny' is a mix and stands alone"),
        (("--floor",), "--floor needs --against"),
        (("--as", "rtn", "--against", "none"), "leave out --against"),
        (("--recipe", "int4"), "--recipe needs --as"),
        (("--as", "nf3"), "'nf3' is not one of"),
        (("--device", "cuda:9"), "cuda:9"),
        (("--few-shot", "5"), "need --tasks"),
        (("--tasks", "needle", "--chat", "--window", 64), "no chat template"),
        (("--window", 10**6), "do not fill one window"),
    ],
)
def test_what_a_user_can_mend_is_one_line_and_exit_2(tiny, texts, tmp_path, args, message):
    mine, parts = tmp_path / "mine.txt", tmp_path / "parts.json"
    mine.write_text("mine")
    parts.write_text('{"kind": "klquant-sensitivity"}')
    args = [str(arg).format(mine=mine, parts=parts) for arg in args]
    done = run(tiny, "--data", texts, "-o", tmp_path / "r.json", *args)
    assert done.exit_code == 2 and message in done.stderr.splitlines()[-1]
    assert sorted(tmp_path.iterdir()) == [mine, parts]
    assert (mine.read_text(), parts.read_text()) == ("mine", '{"kind": "klquant-sensitivity"}')


def test_a_result_is_replaced_by_one_of_the_same_command(tiny, texts, tmp_path):
    out = tmp_path / "r.json"
    out.write_text('{"kind": "klquant-eval", "schema_version": 0}')
    assert run(tiny, "--data", texts, "--window", 64, "--windows", 1, "-o", out).exit_code == 0
    assert load_result(out).overall.windows == 2
