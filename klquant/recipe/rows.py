"""A plan folded into rows for people: one a tensor class, more where a recipe treats parts of a class differently."""

from collections.abc import Iterable
from dataclasses import dataclass

from klquant.checkpoint.names import TensorClass
from klquant.core.spec import WeightSpec
from klquant.recipe.decision import Decision
from klquant.recipe.plan import Part, Plan


@dataclass(frozen=True)
class Row:
    """Tensors of one class that share spec, algorithm and reason. `roles` and `layers` are empty when the row has all
    that the class has; `dtypes` are those before quantization."""

    cls: TensorClass
    roles: tuple[str, ...]
    layers: tuple[int, ...]
    count: int
    dtypes: tuple[str, ...]
    spec: WeightSpec | None
    algorithm: str | None
    why: str
    part: Part


def plan_rows(plan: Plan) -> list[Row]:
    """Rows in the order of TensorClass, within a class in file order."""
    rows = []
    for cls in TensorClass:
        members = [d for d in plan.decisions if d.key.cls == cls]
        all_roles, all_layers = _roles(members), _layers(members)
        groups: dict[tuple, list[Decision]] = {}
        for d in members:
            groups.setdefault((d.spec, d.algorithm, d.why), []).append(d)
        for (spec, algorithm, why), group in groups.items():
            present, layers = set(_roles(group)), _layers(group)
            roles = tuple(role for role in all_roles if role in present)
            rows.append(
                Row(
                    cls=cls,
                    roles=() if roles == all_roles else roles,
                    layers=() if layers == all_layers else layers,
                    count=len(group),
                    dtypes=tuple(sorted({d.dtype for d in group})),
                    spec=spec,
                    algorithm=algorithm,
                    why=why,
                    part=Part.of(group),
                )
            )
    return rows


def _roles(decisions: Iterable[Decision]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(d.key.role for d in decisions))


def _layers(decisions: Iterable[Decision]) -> tuple[int, ...]:
    return tuple(sorted({d.key.layer for d in decisions if d.key.layer is not None}))


def spell_layers(layers: tuple[int, ...]) -> str:
    """(1, 2, 3, 8) → "1-3,8", as a recipe writes it."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)
