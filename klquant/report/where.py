"""Where the error is, in numbers: classes, layers, experts, and what went another way than planned."""

from math import log10

from klquant.core.units import percent, some
from klquant.evaluate.result import ErrorRow
from klquant.report.comparison import Comparison, Variant
from klquant.report.table import Cell, Row, Table
from klquant.report.tables import head

MISSING = "no record of its making (klquant.json): it was made by another tool or left out of the folder"


def class_table(c: Comparison) -> Table | None:
    """Mean error of each tensor class, side by side; None where no variant has a record."""
    made = [v for v in c.variants if v.result.quantization is not None and v.result.quantization.errors]
    classes = list(dict.fromkeys(row.tensor_class for v in made for row in v.result.quantization.errors))
    if not classes:
        return None
    heat = Heat(c)
    rows = []
    for v in made:
        rows.append(Row(head(c, v), tuple(heat.cell([row for row in v.result.quantization.errors
                                                     if row.tensor_class == cls]) for cls in classes)))  # fmt: skip
    return Table("Error by class", tuple(map(spoken, classes)), tuple(rows), heat.note(c), corner="variant")


def layer_table(c: Comparison, variant: Variant) -> Table | None:
    """The heat map of one variant: its error by layer and class, on the scale of all variants."""
    made = variant.result.quantization
    if made is None or not made.errors:
        return None
    heat = Heat(c)
    classes = list(dict.fromkeys(row.tensor_class for row in made.errors))
    layers = sorted({row.layer for row in made.errors if row.layer is not None})
    places = [*layers, *([None] if any(row.layer is None for row in made.errors) else [])]
    rows = [
        Row(Cell("outside" if layer is None else f"layer {layer}"), tuple(
            heat.cell([r for r in made.errors if (r.layer, r.tensor_class) == (layer, cls)]) for cls in classes))
        for layer in places
    ]  # fmt: skip
    return Table("Error by layer and class", tuple(map(spoken, classes)), tuple(rows), heat.note(c))


def expert_table(variant: Variant) -> Table | None:
    """Tokens that the routed experts of each layer got, in calibration and on the evaluated text."""
    made = variant.result.quantization
    calibrated = {} if made is None else made.expert_tokens
    seen = {row.layer: row.expert_tokens for row in variant.result.layers if row.expert_tokens is not None}
    sources = [("calibration", calibrated)] * bool(calibrated) + [("evaluation", seen)]
    if not seen:
        return None
    columns = [f"{source}: {name}" for source, _ in sources for name in ("least", "middle", "most", "without")]
    rows = [
        Row(Cell(f"layer {layer}"), tuple(cell for _, counts in sources for cell in _spread(counts.get(layer))))
        for layer in seen
    ]
    return Table("Tokens an expert", tuple(columns), tuple(rows), "Without: experts that got none.")


def fallbacks(variant: Variant) -> str:
    made, baseline = variant.result.quantization, variant.result.model.baseline
    if baseline is not None:
        what = "grids" if baseline.method == "rtn" else "tensors"
        by = "" if baseline.library is None else f" by {baseline.library}"
        return (
            f"A baseline, for comparison only: the {what} of recipe {baseline.recipe}, rounded{by} as they were read. "
            "Its size is counted from what the method stores."
        )
    if made is None:
        return MISSING[0].upper() + MISSING[1:] + "."
    if not made.fallbacks:
        return "No fallback: every tensor was quantized as its recipe says."
    count = len(made.fallbacks)
    return f"{count:,} fallback{'s' * (count > 1)}: {some(made.fallbacks, 8)}."


class Heat:
    """One logarithmic scale of colour for the errors of all variants."""

    def __init__(self, c: Comparison) -> None:
        made = [v.result.quantization for v in c.variants if v.result.quantization is not None]
        errors = [row.mean_error for q in made for row in q.errors if row.mean_error > 0] or [1.0]
        self.least, self.most = min(errors), max(errors)
        self.by_weights = any(row.measured == "weights" for q in made for row in q.errors)
        self.by_outputs = any(row.measured == "outputs" for q in made for row in q.errors)

    def cell(self, rows: list[ErrorRow]) -> Cell:
        """The mean over the tensors of `rows`."""
        if not rows:
            return Cell("·", quiet=True)
        mean = sum(r.mean_error * r.tensors for r in rows) / sum(r.tensors for r in rows)
        mark = "*" if self.by_outputs and any(r.measured == "weights" for r in rows) else ""
        return Cell(percent(mean) + mark, heat=self._depth(mean))

    def note(self, c: Comparison) -> str:
        what = "of a weight's output on the calibration text" if self.by_outputs else "of a weight"
        text = f"Mean squared error, as a share of the energy {what}."
        if self.by_outputs and self.by_weights:
            text += (
                " * Of the weights themselves: nothing was calibrated there, so compare these with one another only."
            )
        without = [v.name for v in c.variants if v.result.quantization is None]
        return text + (f" Without a record: {', '.join(without)}." if without else "")

    def _depth(self, error: float) -> float:
        if error <= 0 or self.most <= self.least:
            return 0.0
        return max(0.0, (log10(error) - log10(self.least)) / (log10(self.most) - log10(self.least)))


def spoken(cls: str) -> str:
    """mla_kv_b → MLA kv_b, routed_experts → routed experts."""
    kind, _, rest = cls.partition("_")
    return f"{kind.upper()} {rest}" if kind in ("kda", "mla") else cls.replace("_", " ").replace("mlp", "MLP")


def _spread(counts: list[int] | None) -> tuple[Cell, ...]:
    if not counts:
        return (Cell("·", quiet=True),) * 4
    ranked = sorted(counts)
    numbers = (ranked[0], ranked[len(ranked) // 2], ranked[-1])
    without = sum(n == 0 for n in counts)
    return (*(Cell(f"{n:,}") for n in numbers), Cell(f"{without:,}", quiet=not without))
