"""Tasks in the report: beside the reference, with what the number of items can tell."""

import pytest

from klquant.errors import UserError
from klquant.evaluate.tasks.record import TaskDifference
from klquant.report.comparison import Comparison
from klquant.report.page import html
from klquant.report.tasks import task_tables
from klquant.report.text import as_json, as_markdown
from tests.report.build import result, task, tasks
from tests.report.test_page import few


def compare(*results) -> Comparison:
    return Comparison.of([(f"{i}.json", r) for i, r in enumerate(results)])


@pytest.fixture(scope="module")
def two():
    return compare(result("int8", 0.002, 50, tasks=tasks(1)), result("int3", 0.06, 21, tasks=tasks(24)))


def row(table, name):
    return next(r for r in table.rows if r.head.text == name)


def test_scores_stand_beside_the_references_and_chance(two):
    scores, how, *parts = task_tables(two)
    assert scores.columns == ("reference", "int8", "int3", "by chance")
    assert [(r.head.text, r.head.detail) for r in scores.rows] == [
        ("mmlu", "acc"), ("gsm8k", "exact_match, strict-match"), ("needle_multikey", "acc"),
    ]  # fmt: skip
    assert [r.cells[3].text for r in scores.rows] == ["25.0 %", "", "12.5 %"]
    assert [r.cells[0].text for r in scores.rows] == ["75.0 %", "75.0 %", "75.0 %"]
    assert [c.text for c in row(how, "gsm8k").cells] == [
        "200", "5", "all", "0", "no", "lm-eval 0.4.13, task 1.0",
    ]  # fmt: skip
    assert [t.title for t in parts] == ["mmlu acc by part", "needle_multikey acc by part"]
    assert [r.head.text for r in parts[1].rows] == ["1,024 tokens", "65,536 tokens"]


def test_a_change_within_its_standard_error_is_marked(two):
    mmlu, gsm, needle = (r.cells[1:3] for r in task_tables(two)[0].rows)
    assert mmlu[0].quiet and mmlu[0].detail == "≈ -0.2 ± 0.2"
    assert not mmlu[1].quiet and mmlu[1].detail.startswith("-5.0 ± 0.")
    assert gsm[0].quiet and not gsm[1].quiet
    assert gsm[1].text == "63.0 %" and gsm[1].detail.startswith("-12.0 ± 2.")
    assert needle[0].detail == needle[1].detail == "no item changed"


def test_what_is_no_share_is_no_percentage():
    score = task("wiki", 0, {"wiki": 4}, "word_perplexity", None)
    part = score.parts[0].model_copy(update={"scores": None, "value": 7.25, "standard_error": None})
    bare = {"value": 7.25, "standard_error": None, "parts": [part]}
    difference = TaskDifference(mean=0.25, standard_error=None, paired=False)
    changes = {**bare, "reference": score.reference.model_copy(update=bare), "difference": difference}
    table = task_tables(compare(few(tasks=[score.model_copy(update=changes)])))[0]
    cell = table.rows[0].cells[1]
    assert (cell.text, cell.detail, cell.quiet) == ("7.250", "+0.250", False)
    assert "≈" not in table.note


def test_without_a_difference_the_legend_has_none():
    alone = [score.model_copy(update={"reference": None, "difference": None}) for score in tasks(1)]
    assert task_tables(compare(few(tasks=alone)))[0].note == "± one standard error."


def test_a_variant_that_was_not_asked_is_called_that():
    c = compare(few("int8", 0.002, 50), few("int4", 0.01, 27, tasks=tasks(1)))
    scores, _, mmlu, _ = task_tables(c)
    assert [r.cells[1].text for r in scores.rows] == ["not asked"] * 3 != [r.cells[2].text for r in scores.rows]
    assert [cell.text for cell in mmlu.rows[1].cells][:3] == ["40", "0.0 %", "not asked"]


def test_other_questions_are_refused():
    with pytest.raises(UserError, match=r"0\.json and 1\.json cannot be compared: task mmlu: other questions"):
        compare(few(tasks=tasks(0)), few("b", tasks=[task("mmlu", 0, {"a": 40}, sha256="00" * 32)]))


def test_all_forms_have_them_and_nothing_where_there_are_none(two):
    page, markdown = html(two), as_markdown(two)
    assert '<section id="tasks">' in page and '<a href="#tasks">' in page and "## Tasks" in markdown
    assert "| gsm8k | 200 | 5 | all | 0 | no |" in markdown
    assert as_json(two)["variants"][0]["result"]["tasks"][0]["task"] == "mmlu"
    without = compare(few())
    assert "#tasks" not in html(without) and "## Tasks" not in as_markdown(without)
