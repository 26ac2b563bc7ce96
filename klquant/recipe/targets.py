"""What the engine that will load the checkpoint can serve: the rules are data, applied to a finished list of decisions.

`klquant` takes whatever a recipe can say. The rules of vLLM hold for 0.26 to 0.33 alike. A tensor that the engine
wants in 16 bits is kept, and the change recorded with its cost; what cannot be mended so is refused.
"""

from collections import defaultdict
from dataclasses import dataclass, replace

from klquant.checkpoint.names import TensorClass
from klquant.core.spec import WeightSpec
from klquant.errors import UserError
from klquant.recipe.decision import Change, Decision
from klquant.recipe.schema import Recipe


@dataclass(frozen=True)
class Match:
    """Tensors of a class, and why the engine treats them so. No roles: all of the class."""

    cls: TensorClass
    why: str
    roles: frozenset[str] = frozenset()

    def __contains__(self, decision: Decision) -> bool:
        return decision.key.cls == self.cls and (not self.roles or decision.key.role in self.roles)


@dataclass(frozen=True)
class Target:
    """`keep`: always 16 bits. `uniform`: one scheme for these tensors of a layer. The rest: what its kernels take.

    Every group size that a recipe can name is one that Marlin takes, so groups need no rule.
    """

    title: str
    keep: tuple[Match, ...] = ()
    uniform: tuple[Match, ...] = ()
    bits: frozenset[int] = frozenset({3, 4, 8})
    asymmetric: bool = True
    rows_multiple: int = 1


_FUSED_KDA = "vLLM 0.33 fuses it with b and f_a, 0.26 does not; 16 bits load in both"
_FUSED_MLP = "vLLM fuses gate and up into one projection"
_GATE_UP = frozenset({"gate_proj", "up_proj"})

TARGETS = {
    "klquant": Target("klquant's own engine"),
    "vllm": Target(
        "vLLM 0.26 to 0.33",
        keep=(
            Match(TensorClass.KDA_PROJ, _FUSED_KDA, frozenset({"q_proj", "k_proj", "v_proj"})),
            Match(TensorClass.KDA_GATES, _FUSED_KDA, frozenset({"b_proj", "f_a_proj"})),
            Match(TensorClass.MLA_KV_B, "vLLM reads it unpacked and keeps it in 16 bits"),
            Match(TensorClass.ROUTER, "vLLM never gives the router a scheme"),
        ),
        uniform=(
            Match(TensorClass.ROUTED_EXPERTS, "vLLM reads one scheme for all experts of a layer"),
            Match(TensorClass.SHARED_EXPERTS, _FUSED_MLP, _GATE_UP),
            Match(TensorClass.DENSE_MLP, _FUSED_MLP, _GATE_UP),
        ),
        bits=frozenset({4, 8}),
        asymmetric=False,
        rows_multiple=64,
    ),
}
DEFAULT_TARGET = "klquant"


def apply_target(
    name: str, decisions: tuple[Decision, ...], recipe: Recipe
) -> tuple[tuple[Decision, ...], tuple[Change, ...]]:
    """The decisions as the engine can load them, and what had to change. Raises UserError for what it cannot load."""
    if name not in TARGETS:
        raise UserError(f"unknown target {name!r}; known: {', '.join(TARGETS)}")
    target = TARGETS[name]
    kept, changes = _keep(target, decisions)
    for decision in kept:
        if decision.spec is not None:
            _check_kernels(target, decision, recipe)
    _check_uniform(target, kept, recipe)
    return kept, changes


def _keep(target: Target, decisions: tuple[Decision, ...]) -> tuple[tuple[Decision, ...], tuple[Change, ...]]:
    out: list[Decision] = []
    changed: dict[tuple[Match, WeightSpec], list[Decision]] = defaultdict(list)
    for decision in decisions:
        match = next((m for m in target.keep if decision in m), None)
        if decision.spec is None or match is None:
            out.append(decision)
        else:
            out.append(replace(decision, spec=None, algorithm=None, why=match.why))
            changed[match, decision.spec].append(decision)
    return tuple(out), tuple(
        Change(
            match.cls,
            tuple(dict.fromkeys(d.key.role for d in group)),
            len(group),
            spec,
            match.why,
            sum(d.bytes_before - d.bytes_after for d in group),
        )
        for (match, spec), group in changed.items()
    )


def _check_kernels(target: Target, decision: Decision, recipe: Recipe) -> None:
    spec, what, rows = decision.spec, f"{decision.key.cls} {decision.key.role}", decision.shape[0]
    if spec.bits not in target.bits:
        known = " and ".join(f"INT{b}" for b in sorted(target.bits))
        problem = f"{target.title} has no INT{spec.bits} kernel for {what}; it takes {known}"
    elif not spec.symmetric and not target.asymmetric:
        problem = f"{target.title} takes symmetric weights only; {what} has zero points"
    elif rows % target.rows_multiple:
        problem = f"{target.title} needs output features in multiples of {target.rows_multiple}; {what} has {rows}"
    else:
        return
    raise UserError(
        f"{recipe.at(decision.rule, 'weights')}: {problem}; keep it or change it in a recipe of your own, "
        "or use --target klquant"
    )


def _check_uniform(target: Target, decisions: tuple[Decision, ...], recipe: Recipe) -> None:
    for match in target.uniform:
        first: dict[int | None, Decision] = {}
        for decision in decisions:
            if decision not in match:
                continue
            other = first.setdefault(decision.key.layer, decision)
            if other.spec != decision.spec:
                rule = other.rule if decision.rule is None else decision.rule
                raise UserError(
                    f"{recipe.at(rule)}: layer {decision.key.layer}: {match.cls} {other.key.role} is "
                    f"{other.spec or other.dtype} and {decision.key.role} {decision.spec or decision.dtype}, but "
                    f"{match.why}; give them the same weights"
                )
