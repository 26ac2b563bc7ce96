"""Random weights of any shape under any recipe, made on their devices in seconds: for benchmarks and tests."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib import resources

import torch
from torch import Tensor

from klquant.checkpoint.config import KimiLinearConfig
from klquant.checkpoint.names import expected_tensors, parse_name
from klquant.core.grid import Quantized
from klquant.core.spec import WeightSpec
from klquant.engine.build import Places, build_weights
from klquant.engine.sizes import Outline
from klquant.engine.weights import EngineWeights
from klquant.errors import UserError
from klquant.recipe.plan import Plan, make_plan
from klquant.recipe.schema import load_recipe


@dataclass(frozen=True)
class Noise:
    """Random weights of a model with this outline, as a source to build from."""

    outline: Outline
    seed: int = 0
    _generators: dict[torch.device, torch.Generator] = field(default_factory=dict, repr=False, compare=False)

    @property
    def config(self) -> KimiLinearConfig:
        return self.outline.config

    def spec(self, module: str) -> WeightSpec | None:
        return self.outline.specs.get(module)

    def stack(self, modules: Sequence[str], device: torch.device) -> Quantized | Tensor:
        """Weights whose products with inputs of order one are of order one."""
        n, k = self.outline.shapes[f"{modules[0]}.weight"]
        shape, spec = (len(modules), n, k), self.spec(modules[0])
        options = {"device": device, "generator": self._generator(device)}
        if spec is None:
            return torch.randn(shape, dtype=torch.bfloat16, **options) * k**-0.5
        # Without the lowest code their mean is 0, and their deviation 2^bits / √12.
        codes = torch.randint(-spec.qmax, spec.qmax + 1, shape, dtype=torch.int8, **options)
        groups = (*shape[:-1], spec.groups(k))
        scale = (0.5 + torch.rand(groups, **options)) * (12 / k) ** 0.5 / (1 << spec.bits)
        zero = None if spec.symmetric else torch.randint(-1, 2, groups, dtype=torch.int8, **options)
        return Quantized(spec, codes, scale.to(self.outline.scale_dtype), zero)

    def tensor(self, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
        shape, role = self.outline.shapes[name], parse_name(name, self.config).role
        noise = torch.randn(shape, device=device, generator=self._generator(device))
        if "norm" in role:
            noise = 1 + 0.1 * noise
        elif role == "e_score_correction_bias":
            noise = 0.05 * noise
        elif role not in ("A_log", "dt_bias", "embed_tokens"):
            noise = noise * shape[-1] ** -0.5
        return noise.to(dtype)

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self.seed)
        return self._generators[device]


def random_weights(outline: Outline, places: Places, dtype: torch.dtype, seed: int = 0) -> EngineWeights:
    """A whole model of noise, on the devices that `places` says."""
    return build_weights(Noise(outline, seed), places, dtype)


def synthetic_plan(config: KimiLinearConfig, recipe: str) -> Plan:
    """What a recipe (a name, or a .yaml file) makes of a BF16 checkpoint of this shape."""
    return make_plan(load_recipe(recipe), config, {name: ("BF16", s) for name, s in expected_tensors(config).items()})


def synthetic_outline(config: KimiLinearConfig, recipe: str, layers: int | None = None) -> Outline:
    """Of a model as a recipe would quantize it; of its first `layers` layers only, with the same embedding and head."""
    specs = synthetic_plan(config, recipe).specs()
    if layers is not None:
        mla = frozenset(i for i in config.mla_layers if i < layers)
        config = replace(config, num_layers=layers, mla_layers=mla)
    return Outline(config, specs)


def parse_synthetic(text: str) -> tuple[KimiLinearConfig, int]:
    """`NAME` or `NAME:layers=N` → the config of a model that klquant knows without a checkpoint, and N or all layers.

    Raises UserError for a name or an option that there is not.
    """
    name, colon, option = text.partition(":")
    known = sorted(f.name.removesuffix(".json") for f in _configs().iterdir() if f.name.endswith(".json"))
    if name not in known:
        raise UserError(f"unknown synthetic model {name!r}; known: {', '.join(known)}")
    raw = json.loads((_configs() / f"{name}.json").read_text(encoding="utf-8"))
    config = KimiLinearConfig.from_dict(raw, f"{name}.json")
    key, _, value = option.partition("=")
    if not colon:
        return config, config.num_layers
    if key != "layers" or not value.isdecimal() or not 1 <= int(value) <= config.num_layers:
        raise UserError(f"synthetic model {text!r}: write {name}:layers=N with N from 1 to {config.num_layers}")
    return config, int(value)


def _configs():
    return resources.files("klquant.engine") / "configs"
