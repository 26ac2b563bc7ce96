"""Small runs of the whole pipeline: a model, a recipe and text that take a fraction of a second."""

import hashlib
from pathlib import Path

from klquant.checkpoint.reader import CheckpointReader
from klquant.pipeline.report import Silent
from klquant.pipeline.run import RunOptions, quantize
from klquant.recipe.plan import make_plan
from klquant.recipe.schema import Recipe, parse_recipe
from tests.tiny import tiny_checkpoint, tiny_config

RULES = """
  - {tensors: routed_experts, weights: {bits: 4, group_size: 32}, algorithm: gptq, why: w}
  - {tensors: [kda_proj, mla_proj, dense_mlp, shared_experts], weights: {bits: 8, group_size: 32}, algorithm: gptq,
     why: w}
  - {tensors: head, weights: {bits: 8, group_size: 32}, algorithm: rtn, why: w}
"""
TEXT = "calibration: {mix: tiny, tokens: 256, window: 64, min_expert_tokens: 32, max_tokens: 512}"
ROUND = RULES.replace("gptq", "rtn")


def recipe_text(rules: str = RULES, text: str = TEXT, gptq: str = "refine_rounds: 0") -> str:
    return f"name: small\ndescription: d\nrules:{rules}{text}\ngptq: {{{gptq}}}\n"


def recipe(*parts: str, **named: str) -> Recipe:
    return parse_recipe(recipe_text(*parts, **named), "small.yaml")


def short_model(folder: Path, seed: int = 0) -> Path:
    """One KDA layer with a dense MLP, one MLA layer with four experts."""
    attention = tiny_config()["linear_attn_config"] | {"full_attn_layers": [2], "kda_layers": [1]}
    return tiny_checkpoint(folder, seed, num_hidden_layers=2, num_experts=4, linear_attn_config=attention)


def run(model: Path, out: Path, chosen: Recipe | None = None, watcher=None, target: str = "klquant", **options) -> dict:
    """Quantize `model` into `out`; returns the provenance."""
    reader = CheckpointReader.open(model)
    tensors = {name: (info.dtype, info.shape) for name, info in reader.tensors.items()}
    plan = make_plan(chosen or recipe(), reader.config, tensors, target)
    return quantize(reader, plan, out, RunOptions(**options), watcher)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, by its path in there."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def weights(folder: Path) -> dict[str, str]:
    """Digests of the shards. Errors in klquant.json may differ in their last bits, with where in memory things lie."""
    return {name: digest for name, digest in digests(folder).items() if name.endswith(".safetensors")}


def unfinished(out: Path) -> Path:
    return out.with_name(f"{out.name}.unfinished")


class Stopped(Exception):
    """Raised by `Stop`."""


class Stop(Silent):
    """A watcher that stops the run when a unit is in a phase whose name starts with `phase`."""

    def __init__(self, unit: str, phase: str = "") -> None:
        self.at = unit, phase

    def phase(self, unit: str, phase: str, fraction: float) -> None:
        if unit == self.at[0] and phase.startswith(self.at[1]):
            raise Stopped
