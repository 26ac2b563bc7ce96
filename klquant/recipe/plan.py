"""A plan: recipe × config × tensor index → a decision and a reason for every tensor, before any weight is read."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from klquant.checkpoint.config import KimiLinearConfig
from klquant.checkpoint.names import SENSITIVE, TensorClass, TensorKey, expected_tensors, parse_name
from klquant.core.spec import WeightSpec
from klquant.errors import UserError
from klquant.recipe.decision import Change, Decision, stored_tensors
from klquant.recipe.memory import WeightSizes
from klquant.recipe.schema import CALIBRATED, Recipe, Rule
from klquant.recipe.targets import DEFAULT_TARGET, apply_target

# Read inside a mixer, where no calibration inputs are gathered: rounded to nearest or kept.
UNCALIBRATED_ROLES = ("kv_b_proj", "f_b_proj", "g_b_proj")


@dataclass(frozen=True)
class Plan:
    """Every tensor's decision, in file order (embedding, layers, final norm, head)."""

    recipe: Recipe
    config: KimiLinearConfig
    target: str
    decisions: tuple[Decision, ...]
    changes: tuple[Change, ...] = ()
    _by_name: dict[str, Decision] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_name", {d.key.name: d for d in self.decisions})

    def __getitem__(self, name: str) -> Decision:
        """The decision on a hub name."""
        return self._by_name[name]

    @property
    def needs_calibration(self) -> bool:
        return any(d.algorithm in CALIBRATED for d in self.decisions)

    def part(self, *classes: TensorClass) -> "Part":
        """Weights and bytes of some classes; of the whole model when none is named."""
        return Part.of([d for d in self.decisions if not classes or d.key.cls in classes])

    @property
    def always_active(self) -> "Part":
        """What every token reads in full: all but the routed experts and the embedding (of which it reads one row)."""
        return self.part(*(c for c in TensorClass if c not in (TensorClass.ROUTED_EXPERTS, TensorClass.EMBEDDING)))

    @property
    def read_per_token(self) -> "Part":
        """What one decoded token reads at batch 1: what is always active, and its top-k experts in each layer."""
        routed, active = self.part(TensorClass.ROUTED_EXPERTS), self.always_active
        k, n = self.config.top_k, self.config.num_experts
        return Part(
            active.weights + routed.weights * k // n,
            active.bytes_before + routed.bytes_before * k // n,
            active.bytes_after + routed.bytes_after * k // n,
        )

    @property
    def weight_sizes(self) -> WeightSizes:
        """Stored bytes by place in the model, for `predict_memory`."""
        return WeightSizes.of({d.key.name: d.bytes_after for d in self.decisions}, self.config.num_layers)

    def stored_sizes(self) -> dict[str, int]:
        """Output tensor → bytes, in file order: what shards are laid out by before any weight is read."""
        return {s.name: s.nbytes for d in self.decisions for s in stored_tensors(d)}

    def specs(self) -> dict[str, WeightSpec | None]:
        """Linear module → its grid, None when it is kept; in file order."""
        return {d.key.module: d.spec for d in self.decisions if d.key.is_matrix}

    def digest(self) -> str:
        """SHA-256, hex, over the recipe, the target and every decision: equal only for equal work."""
        work = [
            self.recipe.model_dump(mode="json"),
            self.target,
            [(d.key.name, d.dtype, d.shape, d.spec and d.spec.model_dump(), d.algorithm) for d in self.decisions],
        ]
        return hashlib.sha256(json.dumps(work, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Part:
    """Some tensors together."""

    weights: int
    bytes_before: int
    bytes_after: int

    @classmethod
    def of(cls, decisions: Sequence[Decision]) -> "Part":
        return cls(
            sum(d.weights for d in decisions),
            sum(d.bytes_before for d in decisions),
            sum(d.bytes_after for d in decisions),
        )

    @property
    def bits(self) -> float:
        """Stored bits a weight, scales and padding included."""
        return 8 * self.bytes_after / self.weights if self.weights else 0.0


def make_plan(
    recipe: Recipe,
    config: KimiLinearConfig,
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    target: str = DEFAULT_TARGET,
) -> Plan:
    """Decide on every tensor of a checkpoint whose index has been checked (`check_tensors`).

    `tensors`: hub name → (dtype as safetensors spells it, shape). Raises UserError, with `file:line` of the recipe, for
    a rule that matches nothing or cannot apply, and for what `target` cannot load.
    """
    keys = [parse_name(name, config) for name in expected_tensors(config)]
    winners = _winners(recipe, config, list({_kind(key): key for key in keys}.values()))
    decisions = []
    for key in keys:
        index = winners[_kind(key)]
        dtype, shape = tensors[key.name]
        if index is None:
            decisions.append(Decision(key, shape, dtype))
            continue
        rule = recipe.rules[index]
        if rule.weights is not None:
            _check_group(recipe, index, key, shape)
            _check_algorithm(recipe, index, key)
        decisions.append(Decision(key, shape, dtype, rule.weights, rule.algorithm, rule.why, index))
    return Plan(recipe, config, target, *apply_target(target, tuple(decisions), recipe))


def _kind(key: TensorKey) -> tuple:
    """What rules tell apart: the experts of a layer are alike."""
    return key.cls, key.role, key.layer


def _winners(recipe: Recipe, config: KimiLinearConfig, kinds: list[TensorKey]) -> dict[tuple, int | None]:
    """For each kind, of which `kinds` has one key, the last rule that names it.

    Raises UserError for a rule without effect."""
    winner: dict[tuple, int | None] = {_kind(k): None for k in kinds}
    matched: list[list[tuple]] = []
    for i, rule in enumerate(recipe.rules):
        hits = [k for k in kinds if _matches(rule, k)]
        _check_rule(recipe, i, config, kinds, hits)
        matched.append([_kind(k) for k in hits])
        winner |= dict.fromkeys(matched[-1], i)
    for i, hits in enumerate(matched):
        if all(winner[h] != i for h in hits):
            by = sorted({recipe.at(winner[h]) for h in hits})
            raise UserError(
                f"{recipe.at(i)}: this rule has no effect: later rules ({', '.join(by)}) override all of it"
            )
    return winner


def _matches(rule: Rule, key: TensorKey) -> bool:
    return (
        key.cls in rule.tensors
        and (rule.roles is None or key.role in rule.roles)
        and (rule.layers is None or key.layer in rule.layers)
    )


def _check_rule(
    recipe: Recipe, i: int, config: KimiLinearConfig, kinds: list[TensorKey], hits: list[TensorKey]
) -> None:
    """Raise UserError where rule `i` names something the model lacks or weights that must not be quantized."""
    rule, classes = recipe.rules[i], ", ".join(recipe.rules[i].tensors)
    roles = sorted({k.role for k in kinds if k.cls in rule.tensors})
    for role in rule.roles or ():
        if role not in roles:
            raise UserError(f"{recipe.at(i, 'roles')}: {classes} has no role {role!r}; it has {', '.join(roles)}")
    for layer in rule.layers or ():
        if layer >= config.num_layers:
            last = config.num_layers - 1
            raise UserError(f"{recipe.at(i, 'layers')}: there is no layer {layer}; layers count from 0 to {last}")
        if all(k.layer != layer for k in hits):
            raise UserError(f"{recipe.at(i, 'layers')}: layer {layer} (counted from 0) has no tensor of {classes} here")
    if not hits:
        raise UserError(f"{recipe.at(i)}: this rule matches nothing: the model has no tensor of {classes}")
    if rule.weights is None:
        return
    if TensorClass.EMBEDDING in rule.tensors:
        raise UserError(f"{recipe.at(i, 'tensors')}: embedding is a table of rows and never quantized; keep it")
    sensitive = [c for c in rule.tensors if c in SENSITIVE]
    if sensitive and not rule.allow_sensitive:
        raise UserError(
            f"{recipe.at(i, 'tensors')}: {', '.join(sensitive)} loses much accuracy for few bytes and keeps its dtype; "
            "if you mean it, add `allow_sensitive: true` to this rule"
        )
    for key in hits:
        if not key.is_matrix:
            raise UserError(
                f"{recipe.at(i, 'tensors')}: {key.cls} {key.role} is not a matrix and cannot be quantized"
                + (f"; narrow the rule with `roles: {_matrix_roles(hits)}`" if _matrix_roles(hits) else "")
            )


def _matrix_roles(keys: list[TensorKey]) -> str:
    roles = sorted({k.role for k in keys if k.is_matrix})
    return f"[{', '.join(roles)}]" if roles else ""


def _check_group(recipe: Recipe, i: int, key: TensorKey, shape: tuple[int, ...]) -> None:
    spec = recipe.rules[i].weights
    if spec.group_size > 0 and shape[-1] % spec.group_size:
        raise UserError(
            f"{recipe.at(i, 'weights')}: group_size {spec.group_size} does not divide the {shape[-1]} input features "
            f"of {key.cls} {key.role}; choose a divisor, or -1 for one scale a row"
        )


def _check_algorithm(recipe: Recipe, i: int, key: TensorKey) -> None:
    algorithm = recipe.rules[i].algorithm
    if algorithm in CALIBRATED and key.role in UNCALIBRATED_ROLES:
        raise UserError(
            f"{recipe.at(i, 'algorithm')}: no calibration inputs are gathered for {key.cls} {key.role}, so {algorithm} "
            "cannot quantize it; give it a rule of its own with `algorithm: rtn`, or keep it"
        )
