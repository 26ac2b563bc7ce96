"""Values, standard errors and paired differences, against numpy and lm-eval."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from klquant.evaluate.tasks.record import TaskResult, other_items
from klquant.evaluate.tasks.scores import compare, difference, pack, task_value, unpack


def result(parts, weighted_by="items", **changes) -> TaskResult:
    made = dict(
        task="t", metric="acc", higher_is_better=True, chance=0.25, weighted_by=weighted_by,
        items=sum(map(len, parts.values())), cut=0, few_shot=5, limit=None, seed=0, chat=False, version="1", sha256="a",
    )  # fmt: skip
    return TaskResult(**dict(task_value(parts, weighted_by)), **made | changes)


def error(x) -> float:
    return float(np.std(x, ddof=1) / len(x) ** 0.5)


@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=2) | st.lists(st.floats(-5, 5), min_size=2))
def test_one_part_is_a_mean_with_its_standard_error(x):
    value = task_value({"t": x}, "items")
    assert value.value == pytest.approx(float(np.mean(x)), abs=1e-12)
    assert value.standard_error == value.parts[0].standard_error == pytest.approx(error(x), abs=1e-12)
    assert unpack(pack(x)) == [float(y) for y in x]


def test_parts_weigh_by_items_or_alike():
    parts = {"a": [1, 0, 1, 1], "b": [0, 0, 1, 0, 0, 0, 1, 0]}
    by_items, alike = (task_value(parts, way) for way in ("items", "parts"))
    assert by_items.value == pytest.approx(5 / 12) and alike.value == pytest.approx(0.5 * (0.75 + 0.25))
    a, b = (error(x) for x in parts.values())
    assert by_items.standard_error == pytest.approx(((a / 3) ** 2 + (2 * b / 3) ** 2) ** 0.5)
    assert alike.standard_error == pytest.approx(0.5 * (a**2 + b**2) ** 0.5)
    assert [p.scores for p in alike.parts] == ["1011", "00100010"]


def test_strata_of_a_single_item_have_no_standard_error():
    assert task_value({"a": [1.0], "b": [0.0, 1.0]}, "items").standard_error is None


def test_a_difference_is_that_of_the_items_and_more_certain_for_it():
    draw = random.Random(0)
    reference = [float(draw.random() < 0.7) for _ in range(400)]
    ours = [1 - x if draw.random() < 0.03 else x for x in reference]
    d = difference(result({"t": ours}), result({"t": reference}))
    changes = np.subtract(ours, reference)
    assert d.paired and d.mean == pytest.approx(float(changes.mean()))
    assert d.standard_error == pytest.approx(error(changes))
    assert d.standard_error < 0.5 * (error(ours) ** 2 + error(reference) ** 2) ** 0.5


def test_without_items_scores_a_difference_has_the_joint_standard_error():
    def bare(value, standard_error):
        whole = result({"t": [0, 1]})
        part = whole.parts[0].model_copy(update={"scores": None})
        return whole.model_copy(update={"value": value, "standard_error": standard_error, "parts": [part]})

    d = difference(bare(5.0, 0.3), bare(4.0, 0.4))
    assert (d.mean, d.standard_error, d.paired) == (1.0, pytest.approx(0.5), False)
    assert difference(bare(5.0, None), bare(4.0, 0.4)).standard_error is None


def test_a_model_against_itself_differs_by_nothing():
    score = compare(result({"t": [0, 1, 1]}), result({"t": [0, 1, 1]}))
    assert score.difference.mean == score.difference.standard_error == 0
    assert score.reference.value == score.value
    assert compare(result({"t": [0, 1]}), None).reference is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"metric": "other", "seed": 9}, None),
        ({"sha256": "b"}, "task t: other questions"),
        ({"few_shot": 0}, "task t with few-shot 5 and 0"),
        ({"limit": 10}, "task t with limit None and 10"),
        ({"version": "2"}, "task t with version 1 and 2"),
    ],
)
def test_a_task_asked_in_another_way_is_told_apart(changes, reason):
    assert other_items([result({"t": [0, 1]})], [result({"t": [0, 1]}, **changes)]) == reason


def test_standard_errors_are_lm_evals():
    metrics = pytest.importorskip("lm_eval.api.metrics", reason="lm-eval is not installed")
    parts = {"a": [1, 0, 1, 1, 0], "b": [0, 0, 1, 0, 1, 1, 1], "c": [1, 1, 0]}
    alike = task_value(parts, "parts")
    assert [p.standard_error for p in alike.parts] == pytest.approx([metrics.mean_stderr(x) for x in parts.values()])
    assert alike.standard_error == pytest.approx(
        metrics.unweighted_mean_stderr([p.standard_error for p in alike.parts])
    )
