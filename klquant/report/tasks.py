"""What the variants got right and wrong: tasks beside the reference's answers to the same questions."""

from collections.abc import Sequence
from dataclasses import dataclass

from klquant.evaluate.tasks.record import TaskPart, TaskScore, TaskValue
from klquant.report.comparison import Comparison, Variant
from klquant.report.table import Cell, Row, Table

SURE = 1.96  # standard errors that a difference must exceed to be one


@dataclass(frozen=True)
class Asked:
    """One metric of one task, and its scores by variant (None where a variant was not asked)."""

    scores: tuple[TaskScore | None, ...]

    @property
    def any(self) -> TaskScore:
        return next(s for s in self.scores if s is not None)

    @property
    def name(self) -> str:
        return f"{self.any.task} {self.any.metric}"

    @property
    def reference(self) -> TaskValue | None:
        return next((s.reference for s in self.scores if s is not None and s.reference is not None), None)

    @property
    def share(self) -> bool:
        """Whether values are shares of items, to be written in percent."""
        values = [v for s in self.scores if s is not None for v in (s, s.reference) if v is not None]
        return all(p.scores is not None and 0 <= p.value <= 1 for v in values for p in v.parts)


def asked(c: Comparison) -> list[Asked]:
    """In the order of the results."""
    keys = dict.fromkeys((t.task, t.metric) for v in c.variants for t in v.result.tasks)
    return [Asked(tuple(_find(v, *key) for v in c.variants)) for key in keys]


def task_tables(c: Comparison) -> list[Table]:
    """All metrics side by side, how they were asked, and each metric by its parts where it has several."""
    found = asked(c)
    if not found:
        return []
    parts = [_parts_table(c, a) for a in found if len(a.any.parts) > 1]
    return [_overview(c, found), _settings(found), *parts]


def _overview(c: Comparison, found: Sequence[Asked]) -> Table:
    """Rows are metrics: there may be many, with long names."""
    compared = any(a.reference is not None for a in found)
    columns = (*(["reference"] if compared else []), *(v.name for v in c.variants), "by chance")
    rows = []
    for a in found:
        chance = Cell("" if a.any.chance is None else _number(a, a.any.chance), quiet=True)
        reference = [_value(a, a.reference)] if compared else []
        rows.append(Row(Cell(a.any.task, a.any.metric), (*reference, *(_score(a, s) for s in a.scores), chance)))
    return Table("Scores", columns, tuple(rows), _overview_note(found, rows), corner="task")


def _overview_note(found: Sequence[Asked], rows: Sequence[Row]) -> str:
    """What the signs mean that are there."""
    details = [cell.detail for row in rows for cell in row.cells]
    if not any(s is not None and s.difference is not None for a in found for s in a.scores):
        return "± one standard error." if any("±" in detail for detail in details) else ""
    notes = ["Below a variant's score: its change from the reference on the same items, ± one standard error of it."]
    if any("≈" in detail for detail in details):
        notes.append(f"≈: no more than {SURE} standard errors, a change that another choice of items may not show.")
    notes.append("Where all items agree the error is 0: what happens to fewer than 3 in n items is then still not "
                 "excluded (95 %).")  # fmt: skip
    return " ".join(notes)


def _settings(found: Sequence[Asked]) -> Table:
    columns = ("items", "examples", "limit", "seed", "chat template", "version")
    rows = {}
    for a in found:
        t = a.any
        shots, limit = "differ" if t.few_shot is None else str(t.few_shot), "all" if t.limit is None else f"{t.limit:,}"
        cells = (f"{t.items:,}", shots, limit, str(t.seed), "yes" if t.chat else "no", t.version)
        rows[t.task] = Row(Cell(t.task), tuple(map(Cell, cells)))
    return Table("How they were asked", columns, tuple(rows.values()), corner="task", text=True)


def _parts_table(c: Comparison, a: Asked) -> Table:
    """Rows are parts: there may be many."""
    columns = ["items", *(["reference"] if a.reference is not None else []), *(v.name for v in c.variants)]
    rows = []
    for i, part in enumerate(a.any.parts):
        values = [*([a.reference] if a.reference is not None else []), *a.scores]
        cells = [_value(a, None if value is None else value.parts[i]) for value in values]
        rows.append(Row(Cell(part.name), (Cell(f"{part.items:,}"), *cells)))
    error = "± one standard error." if any("±" in cell.detail for row in rows for cell in row.cells) else ""
    chance = "" if a.any.chance is None else f"By chance: {_number(a, a.any.chance)}."
    return Table(f"{a.name} by part", tuple(columns), tuple(rows), f"{error} {chance}".strip(), corner="part")


def _score(a: Asked, score: TaskScore | None) -> Cell:
    if score is None:
        return Cell("not asked", quiet=True)
    d = score.difference
    if d is None:
        return _value(a, score)
    scale, places = (100, 1) if a.share else (1, 3)
    error = "" if d.standard_error is None else f" ± {scale * d.standard_error:.{places}f}"
    unclear = d.standard_error is not None and abs(d.mean) <= SURE * d.standard_error
    change = f"{'≈ ' if unclear else ''}{scale * d.mean:+.{places}f}{error}"
    if d.paired and d.mean == d.standard_error == 0:
        change = "no item changed"
    return Cell(_number(a, score.value), change, quiet=unclear)


def _value(a: Asked, value: TaskValue | TaskPart | None) -> Cell:
    if value is None:
        return Cell("not asked", quiet=True)
    error = "" if value.standard_error is None else f"± {_number(a, value.standard_error)}"
    return Cell(_number(a, value.value), error)


def _number(a: Asked, value: float) -> str:
    return f"{100 * value:.1f} %" if a.share else f"{value:.3f}"


def _find(variant: Variant, task: str, metric: str) -> TaskScore | None:
    return next((t for t in variant.result.tasks if (t.task, t.metric) == (task, metric)), None)
