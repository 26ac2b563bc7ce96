"""What a result keeps of a task: the score, its standard error, and each item's score, so that models can be paired."""

from collections.abc import Sequence
from typing import Literal, Self

from pydantic import model_validator

from klquant.evaluate.part import Part


class TaskPart(Part):
    """A share of a task: a subject, a length. `scores`: each item's, as a string of digits where all are 0 or 1; None
    where the metric is no mean of them."""

    name: str
    items: int
    value: float
    standard_error: float | None
    scores: str | list[float] | None


class TaskValue(Part):
    """`standard_error` takes the parts as strata; None where one has a single item or the metric has none."""

    value: float
    standard_error: float | None
    parts: list[TaskPart]

    @property
    def part_names(self) -> list[str]:
        return [part.name for part in self.parts]


class TaskResult(TaskValue):
    """What one model got in one metric. Parts weigh by their items or all alike. `chance`: what guessing gets.
    `few_shot`: examples before a question, None where parts differ. `cut`: questions that lost their beginning because
    they were longer than the model's context. `sha256` covers everything that was asked."""

    task: str
    metric: str
    higher_is_better: bool
    chance: float | None
    weighted_by: Literal["items", "parts"]
    items: int
    cut: int
    few_shot: int | None
    limit: int | None
    seed: int
    chat: bool
    version: str
    sha256: str


class TaskDifference(Part):
    """Model − reference. `paired`: the standard error is that of the items' differences, else √(Σ of squares)."""

    mean: float
    standard_error: float | None
    paired: bool


class TaskScore(TaskResult):
    """A model's result beside the reference's on the same items."""

    reference: TaskValue | None
    difference: TaskDifference | None

    @model_validator(mode="after")
    def _has_the_same_parts(self) -> Self:
        if self.reference is not None and self.reference.part_names != self.part_names:
            raise ValueError("the reference has other parts")
        return self


def other_items(a: Sequence[TaskResult], b: Sequence[TaskResult]) -> str | None:
    """Why a task of `a` and the same one of `b` may not stand in one table; None where all may."""
    known = {(t.task, t.metric): t for t in a}
    for theirs in b:
        ours = known.get((theirs.task, theirs.metric))
        if ours is None:
            continue
        for what in ("version", "seed", "limit", "few_shot", "chat"):
            if getattr(ours, what) != getattr(theirs, what):
                return (
                    f"task {ours.task} with {what.replace('_', '-')} {getattr(ours, what)} and {getattr(theirs, what)}"
                )
        if (ours.sha256, ours.part_names) != (theirs.sha256, theirs.part_names):
            return f"task {ours.task}: other questions"
    return None
