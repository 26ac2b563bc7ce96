"""`quantization_config` read: which module has which grid, by compressed-tensors' matching rule.

A module is resolved by its exact name first, then by regexes in alphabetical order, then by class names; `ignore`
overrules all. Other tools' checkpoints are read as well as klquant's own.
"""

import re
from dataclasses import dataclass
from functools import cached_property

from klquant.checkpoint.config import KimiLinearConfig
from klquant.checkpoint.names import TensorClass, expected_tensors, parse_name
from klquant.core.spec import WHOLE_ROW, WeightSpec
from klquant.errors import UserError

FORMAT = "pack-quantized"
_CLASSES = ("Linear", "Module")


@dataclass(frozen=True)
class Schemes:
    """A `quantization_config` resolved: `spec(module)` by compressed-tensors' matching rule."""

    groups: dict[str, WeightSpec]
    targets: dict[str, str]  # target → group, in the order of precedence
    ignore: tuple[str, ...]

    @classmethod
    def from_config(cls, raw: object, where: str) -> "Schemes":
        """Read `quantization_config`. Raises UserError naming `where` and the group that klquant cannot read."""
        if not isinstance(raw, dict) or raw.get("quant_method") != "compressed-tensors":
            method = raw.get("quant_method") if isinstance(raw, dict) else None
            raise UserError(f"{where}: quantization_config: quant_method {method!r} is not 'compressed-tensors'")
        if raw.get("transform_config"):
            raise UserError(f"{where}: quantization_config: transform_config (rotations) is not supported")
        groups, ignore = raw.get("config_groups"), raw.get("ignore") or []
        if not isinstance(groups, dict) or not groups:
            raise UserError(f"{where}: quantization_config: config_groups is missing")
        if not _is_strings(ignore):
            raise UserError(f"{where}: quantization_config: ignore is not a list of names")
        specs, targets = {}, {}
        for name, group in groups.items():
            at = f"{where}: quantization_config: group {name}"
            if not isinstance(group, dict) or not _is_strings(group.get("targets")) or not group["targets"]:
                raise UserError(f"{at}: targets is not a list of names")
            specs[name] = _read_spec(group, group.get("format") or raw.get("format"), at)
            targets |= dict.fromkeys(group["targets"], name)
        for pattern in (*targets, *ignore):
            _check_pattern(pattern, where)
        order = sorted(targets, key=lambda target: ("re:" in target, target))
        return cls(specs, {target: targets[target] for target in order}, tuple(ignore))

    def group(self, module: str, is_linear: bool = True) -> str | None:
        """The group a module belongs to, or None. Class names (`Linear`) match only where `is_linear`."""
        classes = _CLASSES if is_linear else ()
        names, regexes = self._ignored
        if module in names or any(c in names for c in classes) or any(r.match(module) for r in regexes):
            return None
        by_name = next((group for target, group in self.targets.items() if _matches(module, target)), None)
        return by_name or next((group for target, group in self.targets.items() if target in classes), None)

    @cached_property
    def _ignored(self) -> tuple[frozenset[str], list[re.Pattern]]:
        """`ignore` as names and regexes; other tools list hundreds of names."""
        regexes = [re.compile(pattern.removeprefix("re:")) for pattern in self.ignore if pattern.startswith("re:")]
        return frozenset(self.ignore), regexes

    def spec(self, module: str, is_linear: bool = True) -> WeightSpec | None:
        group = self.group(module, is_linear)
        return None if group is None else self.groups[group]


def linear_modules(config: KimiLinearConfig) -> dict[str, bool]:
    """Every weight matrix of the model: module → whether it is an `nn.Linear` there (a router is not)."""
    keys = (parse_name(name, config) for name in expected_tensors(config))
    return {key.module: key.cls != TensorClass.ROUTER for key in keys if key.is_matrix}


def _read_spec(group: dict, form: object, where: str) -> WeightSpec:
    weights = group.get("weights")
    if form != FORMAT or not isinstance(weights, dict):
        raise UserError(f"{where}: format {form!r} is not supported; klquant reads {FORMAT!r}")
    if weights.get("type", "int") != "int":
        raise UserError(
            f"{where}: weights of type {weights['type']!r} are not supported; klquant reads integer weights"
        )
    if group.get("input_activations") or group.get("output_activations") or weights.get("dynamic"):
        raise UserError(f"{where}: quantized activations are not supported; klquant reads weight-only schemes")
    if weights.get("actorder") in ("group", "dynamic", True):
        raise UserError(f"{where}: actorder {weights['actorder']!r} (g_idx) is not supported")
    size, strategy = weights.get("group_size"), weights.get("strategy")
    if strategy is None and size is not None:
        strategy = "channel" if size == WHOLE_ROW else "group"
    if strategy not in ("group", "channel"):
        raise UserError(f"{where}: strategy {strategy!r} is not supported; klquant reads 'group' and 'channel'")
    try:
        return WeightSpec(
            bits=weights.get("num_bits", 8),
            group_size=WHOLE_ROW if strategy == "channel" else size,
            symmetric=weights.get("symmetric", True),
        )
    except ValueError:
        raise UserError(
            f"{where}: {weights.get('num_bits')!r} bits with group size {size!r} are not supported; "
            "klquant reads 3, 4 and 8 bits in groups of 32, 64, 128 or a row"
        ) from None


def _is_strings(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _check_pattern(pattern: str, where: str) -> None:
    try:
        re.compile(pattern.removeprefix("re:"))
    except re.error as error:
        raise UserError(f"{where}: quantization_config: {pattern!a:.200} is not a pattern ({error})") from None


def _matches(module: str, pattern: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), module) is not None
    return pattern == module
