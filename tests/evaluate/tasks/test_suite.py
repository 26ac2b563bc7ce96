"""Tasks in an evaluation: beside the reference, in the result file, kept when interrupted, shared by variants."""

import json
import sys
from dataclasses import replace

import pytest

from klquant.errors import UserError
from klquant.evaluate.options import TaskOptions
from klquant.evaluate.result import check_comparable, load_result
from klquant.evaluate.run import evaluate
from klquant.evaluate.tasks import needle
from klquant.evaluate.tasks.harness import Harness
from klquant.evaluate.tasks.scores import unpack
from tests.evaluate.test_run import Stages, same

NEEDLES = ("needle_single", "needle_multikey", "needle_multivalue")


@pytest.fixture(autouse=True)
def short_texts(monkeypatch):
    monkeypatch.setattr(needle, "LENGTHS", (800, 1000))


@pytest.fixture
def asked(options, reference_cache):
    return replace(options, tasks=TaskOptions(("needle",), limit=3), reference_cache=reference_cache)


def stages(watcher) -> list[str]:
    return [name for name, _ in watcher.stages if not name.startswith("questions")]


def test_tasks_stand_beside_the_references_on_the_same_items(variant, tiny, asked, tmp_path):
    out, watcher = tmp_path / "r.json", Stages()
    result = evaluate(variant, tiny, out, asked, watcher)
    assert load_result(out) == result
    assert [(t.task, t.metric) for t in result.tasks] == [(n, m) for n in NEEDLES for m in ("acc", "exact_match")]
    for t in result.tasks:
        assert [p.name for p in t.parts] == ["800 tokens", "1,000 tokens"] and t.items == 6 and t.seed == 0
        changes = [
            x - y for p, q in zip(t.parts, t.reference.parts, strict=True)
            for x, y in zip(unpack(p.scores), unpack(q.scores), strict=True)
        ]  # fmt: skip
        assert t.difference.paired and t.difference.mean == pytest.approx(sum(changes) / 6)
    assert [t.chance for t in result.tasks] == [1 / 8, None, 1 / 8, None, 1 / 6, None]
    assert watcher.work == [total for _, total in watcher.stages]


def test_the_reference_itself_differs_by_nothing(tiny, asked, tmp_path):
    result = evaluate(tiny, tiny, tmp_path / "r.json", asked)
    assert all(t.difference.mean == t.difference.standard_error == 0 for t in result.tasks)


def test_without_a_reference_there_is_no_difference(tiny, asked, tmp_path):
    result = evaluate(tiny, None, tmp_path / "r.json", replace(asked, tasks=TaskOptions(("needle_single",), limit=2)))
    assert [t.reference for t in result.tasks] == [t.difference for t in result.tasks] == [None, None]


def test_finished_tasks_are_not_done_again(variant, tiny, asked, tmp_path):
    """Interrupted in the model's third task; another variant then finds the reference's answers."""
    out, asked = tmp_path / "r.json", replace(asked, reference_cache=tmp_path / "cache")

    class Stopped(Stages):
        def begin(self, stage, total):
            super().begin(stage, total)
            if stage == "needle_multivalue, model":
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(variant, tiny, out, asked, Stopped())
    watcher = Stages()
    resumed = evaluate(variant, tiny, out, asked, watcher)
    assert stages(watcher) == ["needle_multivalue, model"]
    watcher = Stages()
    again = evaluate(variant, tiny, tmp_path / "again.json", asked, watcher)
    assert stages(watcher) == ["model", *(f"{name}, model" for name in NEEDLES)]
    assert same(resumed, again)
    watcher = Stages()
    evaluate(variant, tiny, out, replace(asked, tasks=TaskOptions(("needle_single",), limit=3, seed=1)), watcher)
    assert stages(watcher) == ["model", "needle_single, reference", "needle_single, model"], "another seed, other items"


def test_a_damaged_file_of_a_finished_task_is_named(variant, tiny, asked, tmp_path):
    asked = replace(asked, reference_cache=tmp_path / "cache")
    evaluate(variant, tiny, tmp_path / "r.json", asked)
    file = next(tmp_path.glob("cache/tasks/*.json"))
    file.write_text("[{}]")
    with pytest.raises(UserError, match=rf"{file.name}: damaged; delete it"):
        evaluate(variant, tiny, tmp_path / "r.json", asked)


def test_a_streamed_model_answers_the_same(variant, tiny, asked, tmp_path, request):
    whole = evaluate(variant, tiny, tmp_path / "r.json", asked)
    request.getfixturevalue("streamed")
    streamed = evaluate(variant, tiny, tmp_path / "r.json", replace(asked, reference_cache=tmp_path / "cache"))
    assert streamed.tasks == whole.tasks


def test_results_from_before_there_were_tasks_are_read(result, tmp_path):
    raw = result.model_dump(mode="json")
    assert raw.pop("tasks") == []
    (tmp_path / "old.json").write_text(json.dumps(raw))
    assert load_result(tmp_path / "old.json") == result


def test_results_of_other_questions_are_not_compared(variant, tiny, asked, result, tmp_path):
    ours = evaluate(variant, tiny, tmp_path / "a.json", asked)
    other = evaluate(variant, tiny, tmp_path / "b.json", replace(asked, tasks=TaskOptions(("needle",), limit=2)))
    plain = other.model_copy(update={"tasks": []})
    check_comparable([("plain", plain), ("ours", ours)])
    with pytest.raises(UserError, match="ours and other cannot be compared: task needle_single with limit 3 and 2"):
        check_comparable([("plain", plain), ("ours", ours), ("other", other)])


def test_a_slip_in_a_name_of_klquants_own_is_seen_without_lm_eval(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(UserError, match=r"task neddle \(did you mean needle\?\) needs lm-eval"):
        Harness(["gsm8k", "neddle"], ["needle", *NEEDLES], TaskOptions(("gsm8k", "neddle")))
    with pytest.raises(UserError, match=r"task gsm8k needs lm-eval"):
        Harness(["gsm8k"], ["needle", *NEEDLES], TaskOptions(("gsm8k",)))
