"""What a recipe may say: a strict, frozen schema for `recipes/*.yaml`, and the built-in recipes by name.

A recipe is a list of rules. A rule names tensor classes (narrowed by roles and layers) and either gives their weights
a grid and an algorithm or keeps them; a later rule overrides an earlier one; a tensor that no rule names is kept.
Every error is one line that starts with `file:line`.
"""

import difflib
import json
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

from klquant.checkpoint.names import TensorClass
from klquant.core.spec import WeightSpec
from klquant.errors import UserError
from klquant.recipe.yamlfile import YamlFile, packaged, parse_yaml, read_yaml

DEFAULT_RECIPE = "int4"

Algorithm = Literal["gptq", "awq", "rtn"]
CALIBRATED: frozenset[str] = frozenset({"gptq", "awq"})


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _classes(value: Any) -> tuple[TensorClass, ...]:
    names, known = _words(value), list(TensorClass)
    for name in names:
        if name not in known:
            raise ValueError(f"unknown tensor class {name!r}{_near(name, known)}; known: {', '.join(known)}")
    return tuple(TensorClass(name) for name in names)


def _words(value: Any) -> tuple[str, ...]:
    words = [value] if isinstance(value, str) else value
    if not isinstance(words, list | tuple) or not words or not all(isinstance(w, str) and w for w in words):
        raise ValueError("expected a name or a list of names")
    if len(set(words)) != len(words):
        raise ValueError("a name appears twice")
    return tuple(words)


def _layers(value: Any) -> tuple[int, ...]:
    """`"1-5,8"`, `8` or `[1, 2]` → sorted 0-based layers."""
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    layers: set[int] = set()
    for part in parts:
        first, _, last = str(part).strip().partition("-")
        last = last or first
        # five digits are far beyond any model and keep a typing error from building a huge range
        if not all(x.strip().isdecimal() and len(x) < 6 for x in (first, last)):
            raise ValueError(f"{part!r} is not a layer or a range of layers, counted from 0; write '1-5,8'")
        if int(first) > int(last):
            raise ValueError(f"the range {part.strip()!r} runs backwards")
        layers.update(range(int(first), int(last) + 1))
    if not layers:
        raise ValueError("names no layer")
    return tuple(sorted(layers))


def _near(word: str, known) -> str:
    match = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {match[0]}?)" if match else ""


class Rule(Section):
    """Tensors, and what becomes of them."""

    tensors: Annotated[tuple[TensorClass, ...], BeforeValidator(_classes)]
    roles: Annotated[tuple[str, ...], BeforeValidator(_words)] | None = None
    layers: Annotated[tuple[int, ...], BeforeValidator(_layers)] | None = None
    weights: WeightSpec | None = None
    keep: Literal[True] | None = None
    algorithm: Algorithm | None = None
    allow_sensitive: bool = False
    why: str = Field(min_length=1)

    @model_validator(mode="after")
    def _one_action(self) -> "Rule":
        if (self.weights is None) == (self.keep is None):
            raise ValueError("a rule has either `weights: {bits: …}` or `keep: true`")
        if self.weights is not None and self.algorithm is None:
            raise ValueError("a rule with weights needs `algorithm: gptq`, `awq` or `rtn`")
        if self.keep and (self.algorithm is not None or self.allow_sensitive):
            raise ValueError("a rule that keeps its tensors has no algorithm and no allow_sensitive")
        return self


class CalibrationParams(Section):
    """Text that calibrated algorithms see. Counts are in tokens."""

    mix: str = "default"
    tokens: int = Field(default=131_072, ge=1)
    window: int = Field(default=2_048, ge=2)
    seed: int = Field(default=0, ge=0)
    # more text is drawn until the first-percentile expert has seen this many tokens, or max_tokens is reached
    min_expert_tokens: int = Field(default=256, ge=0)
    max_tokens: int = Field(default=524_288, ge=1)

    @model_validator(mode="after")
    def _sizes(self) -> "CalibrationParams":
        if not self.window <= self.tokens <= self.max_tokens:
            raise ValueError("calibration needs window ≤ tokens ≤ max_tokens")
        return self


class GPTQParams(Section):
    """`damp`: added to the Hessian's diagonal, as a fraction of its mean. `shrink_tokens`: τ of the shrinkage toward
    the layer-wide Hessian, in tokens. `weighting`: of a routed token in its expert's Hessian. `refine_rounds`: scale
    refit and coordinate descent on the codes after the column pass. `correction`: how far a weight's target is moved to
    undo what earlier layers' errors did to its inputs and to the residual stream (0: not at all); `correction_ridge`
    holds it back where few tokens stand behind it: a ridge of that many times the Hessian's mean diagonal, divided by
    tokens an input. `router_share`: how far a map that writes into the residual stream is rounded for what later
    routers read of its errors, rather than for all outputs alike (0: not at all). docs/accuracy.md has the
    measurements."""

    damp: float = Field(default=0.05, gt=0, le=1)
    shrink_tokens: int = Field(default=1024, ge=0)
    weighting: Literal["plain", "gate"] = "plain"
    refine_rounds: int = Field(default=3, ge=0, le=100)
    correction: float = Field(default=0.5, ge=0, le=1)
    correction_ridge: float = Field(default=2.5, gt=0)
    router_share: float = Field(default=0.3, ge=0, lt=1)


class AWQParams(Section):
    """`grid`: points tried for the scale exponent in [0, 1]. `clip`: whether to search a clipping range as well."""

    grid: int = Field(default=20, ge=1, le=1000)
    clip: bool = True


class Recipe(Section):
    """One file of `recipes/`."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    description: str = Field(min_length=1)
    rules: tuple[Rule, ...] = Field(min_length=1)
    calibration: CalibrationParams = CalibrationParams()
    gptq: GPTQParams = GPTQParams()
    awq: AWQParams = AWQParams()

    _file: YamlFile | None = PrivateAttr(default=None)

    def at(self, rule: int, key: str | None = None) -> str:
        """Where rule number `rule` (or its `key`) stands: `file:line`; without a file, `name: rules[i]`."""
        if self._file is None:
            return f"{self.name}: rules[{rule}]"
        return self._file.at(("rules", rule) if key is None else ("rules", rule, key))

    def mix_at(self) -> str:
        """Where its calibration text is named."""
        return self.name if self._file is None else self._file.at(("calibration", "mix"))


def known_recipes() -> list[str]:
    """Names of the recipes that travel with the package."""
    return packaged("klquant.recipes")


def load_recipe(name_or_path: str | Path) -> Recipe:
    """A built-in recipe by name, or a file whose name ends in .yaml. Raises UserError, `file:line: …`."""
    text = str(name_or_path)
    if text.endswith((".yaml", ".yml")):
        return _validate(read_yaml(Path(text)))
    if text not in known_recipes():
        raise UserError(
            f"unknown recipe {text!r}{_near(text, known_recipes())}; known: {', '.join(known_recipes())}, "
            "or the path of a .yaml file"
        )
    return parse_recipe((_package() / f"{text}.yaml").read_text(encoding="utf-8"), f"{text}.yaml")


def parse_recipe(text: str, where: str) -> Recipe:
    """A recipe from YAML text; `where` stands for the file in errors."""
    return _validate(parse_yaml(text, where))


def _package():
    return resources.files("klquant") / "recipes"


def _validate(file: YamlFile) -> Recipe:
    try:
        # By way of JSON, pydantic's strict mode takes lists for tuples and still refuses "4" for 4 and 1 for true.
        recipe = Recipe.model_validate_json(json.dumps(file.data), strict=True)
    except ValidationError as e:
        raise UserError(_one_line(e, file)) from e
    recipe._file = file
    return recipe


def _one_line(error: ValidationError, file: YamlFile) -> str:
    """The first problem as `file:line: …`. Unknown keys come first, for a misspelt key also looks like a missing one;
    an empty list comes last, for pydantic also calls a list empty whose items are wrong."""
    rank = {"extra_forbidden": 0, "too_short": 2}
    first = min(error.errors(), key=lambda e: (rank.get(e["type"], 1), file.lines.get(e["loc"], 0)))
    loc = first["loc"]
    key, section = _dotted(loc), _section(loc[:-1])
    match first["type"]:
        case "extra_forbidden":
            near = _near(str(loc[-1]), section)
            return f"{file.at(loc)}: unknown key {key!r}{near}; known here: {', '.join(section)}"
        case "missing":
            return f"{file.at(loc)}: {key} is missing"
        case "too_short":
            return f"{file.at(loc)}: {key} is empty"
        case "value_error":
            prefix = f"{key}: " if loc and loc[-1] in ("tensors", "roles", "layers") else ""
            return f"{file.at(loc)}: {prefix}{first['ctx']['error']}"
        case _:
            text = first["msg"][0].lower() + first["msg"][1:]
            return f"{file.at(loc)}: {key} is {first['input']!r:.60}: {text}"


def _dotted(loc: tuple) -> str:
    """("rules", 2, "weights", "bits") → weights.bits: the line already says which rule."""
    return ".".join(str(x) for x in loc if isinstance(x, str) and x != "rules") or "rules"


def _section(loc: tuple) -> list[str]:
    """The keys that may stand at `loc`."""
    models: dict[tuple[str, ...], type[BaseModel]] = {
        (): Recipe, ("rules",): Rule, ("rules", "weights"): WeightSpec, ("calibration",): CalibrationParams,
        ("gptq",): GPTQParams, ("awq",): AWQParams,
    }  # fmt: skip
    return list(models[tuple(x for x in loc if isinstance(x, str))].model_fields)
