"""Items' scores → values and standard errors, of one model and of the difference of two. Sums in float64."""

from collections.abc import Mapping, Sequence
from math import fsum, sqrt
from typing import Literal

from klquant.evaluate.tasks.record import TaskDifference, TaskPart, TaskResult, TaskScore, TaskValue

Weighting = Literal["items", "parts"]


def task_value(scores: Mapping[str, Sequence[float]], weighted_by: Weighting) -> TaskValue:
    """The mean over the items of each part (name → scores), and over parts."""
    parts = [
        TaskPart(name=name, items=len(x), value=_mean(x), standard_error=_error(x), scores=pack(x))
        for name, x in scores.items()
    ]
    value, error = _over_parts(list(scores.values()), weighted_by)
    return TaskValue(value=value, standard_error=error, parts=parts)


def compare(ours: TaskResult, theirs: TaskResult | None) -> TaskScore:
    """`ours` beside the reference's result on the same items."""
    if theirs is None:
        return TaskScore(**dict(ours), reference=None, difference=None)
    assert ours.sha256 == theirs.sha256, f"{ours.task}: the two models were asked different things"
    reference = TaskValue(value=theirs.value, standard_error=theirs.standard_error, parts=theirs.parts)
    return TaskScore(**dict(ours), reference=reference, difference=difference(ours, theirs))


def difference(ours: TaskResult, theirs: TaskResult) -> TaskDifference:
    pairs = [(unpack(a.scores), unpack(b.scores)) for a, b in zip(ours.parts, theirs.parts, strict=True)]
    if any(a is None or b is None for a, b in pairs):
        errors = (ours.standard_error, theirs.standard_error)
        joint = None if None in errors else sqrt(fsum(e * e for e in errors))
        return TaskDifference(mean=ours.value - theirs.value, standard_error=joint, paired=False)
    changes = [[x - y for x, y in zip(a, b, strict=True)] for a, b in pairs]
    mean, error = _over_parts(changes, ours.weighted_by)
    return TaskDifference(mean=mean, standard_error=error, paired=True)


def pack(scores: Sequence[float]) -> str | list[float]:
    """A digit an item where all are 0 or 1."""
    if all(x in (0, 1) for x in scores):
        return "".join(str(int(x)) for x in scores)
    return [float(x) for x in scores]


def unpack(scores: str | list[float] | None) -> list[float] | None:
    return [float(x) for x in scores] if scores is not None else None


def _over_parts(parts: Sequence[Sequence[float]], weighted_by: Weighting) -> tuple[float, float | None]:
    """Σ w·mean and √Σ(w·standard error)², the parts being strata of weight w."""
    total = sum(map(len, parts))
    weights = [len(x) / total if weighted_by == "items" else 1 / len(parts) for x in parts]
    value = fsum(w * _mean(x) for w, x in zip(weights, parts, strict=True))
    errors = [_error(x) for x in parts]
    if None in errors:
        return value, None
    return value, sqrt(fsum((w * e) ** 2 for w, e in zip(weights, errors, strict=True)))


def _mean(x: Sequence[float]) -> float:
    return fsum(x) / len(x)


def _error(x: Sequence[float]) -> float | None:
    """Standard error of the mean, None of a single item."""
    if len(x) < 2:
        return None
    mean = _mean(x)
    return sqrt(fsum((y - mean) ** 2 for y in x) / (len(x) - 1) / len(x))
