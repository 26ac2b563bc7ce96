"""`klquant bench MODEL`: how fast the engine is here, what memory it takes, and how near the bandwidth it comes."""

import json
from typing import TYPE_CHECKING

import click

from klquant.cli.engine import named_as_options, placing_options
from klquant.recipe.schema import DEFAULT_RECIPE

if TYPE_CHECKING:
    import torch

    from klquant.engine.placement import Placement
    from klquant.engine.weights import EngineWeights

# By kind of device: prompts, batches, contexts, steps. On a CPU the plain torch path runs.
DEFAULTS = {
    "cuda": ((512, 2048, 16_384, 65_536), (1, 4, 8, 16, 32, 64), (128, 16_384, 131_072, 524_288), 128),
    "cpu": ((128, 512), (1, 4), (128, 512), 8),
}


class Numbers(click.ParamType):
    """1,4,16k: numbers with commas between, k and M for powers of two; 0 for none of them."""

    name = "numbers"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        found = []
        for part in str(value).split(","):
            digits = part.strip().rstrip("kM")
            factor = {"": 1, "k": 1 << 10, "M": 1 << 20}.get(part.strip()[len(digits) :])
            if not digits.isdecimal() or factor is None:
                self.fail(f"{part!r} is not a number such as 512, 16k or 1M", param, ctx)
            found.append(int(digits) * factor)
        return tuple(n for n in dict.fromkeys(found) if n)


@click.command("bench")
@click.argument("model", required=False)
@click.option("--synthetic", metavar="NAME[:layers=N]",
              help="Instead of MODEL: random weights of a known shape, kimi-linear-48b.")  # fmt: skip
@click.option("--recipe", help=f"With --synthetic: what the weights are stored as.  [default: {DEFAULT_RECIPE}]")
@placing_options
@click.option("--prefill", type=Numbers(), help="Prompt lengths, such as 512,16k; 0 for none.  [default: by device]")
@click.option("--batch", type=Numbers(), help="Sequences that decode together.  [default: by device]")
@click.option("--context", type=Numbers(), help="Tokens each of them holds.  [default: by device]")
@click.option("--steps", type=click.IntRange(1), help="Decode steps to time.  [default: by device]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
def command(
    model: str | None, synthetic: str | None, recipe: str | None, devices: str | None,
    max_memory: dict[str, int] | None, cache_bits: str, prefill: tuple[int, ...] | None,
    batch: tuple[int, ...] | None, context: tuple[int, ...] | None, steps: int | None, as_json: bool,
) -> None:  # fmt: skip
    """Time prefill and decode of MODEL, a checkpoint in 16 bits or quantized, with random tokens.

    Shows time to first token, tokens a second, memory by part as predicted and as it is, and the bytes a step moves as
    a share of what a copy reaches. With --synthetic no checkpoint is needed.
    """
    if (model is None) == (synthetic is None):
        raise click.UsageError("give either MODEL or --synthetic NAME")
    if recipe and synthetic is None:
        raise click.UsageError("--recipe goes with --synthetic; a checkpoint is what it is")
    from klquant.cli.bench_run import bench_json, run
    from klquant.cli.bench_table import Notes, print_bench
    from klquant.engine.bench import Cells
    from klquant.engine.engine import default_devices
    from klquant.engine.placement import find_devices, host_room

    with named_as_options():
        found = find_devices(default_devices() if devices is None else devices, max_memory)
    kind = next(iter(found)).type
    given = (prefill, batch, context, steps)
    cells = Cells(*(default if value is None else value for value, default in zip(given, DEFAULTS[kind], strict=True)))
    source = _Checkpoint(model) if synthetic is None else _Synthetic(synthetic, recipe or DEFAULT_RECIPE)
    with Notes(quiet=as_json) as notes, named_as_options():
        if kind == "cpu":
            notes.note("no GPU: this times the plain torch path, which is slow and only meant to work everywhere")
        result = run(source, found, cells, int(cache_bits), host_room(max_memory), notes)
    if as_json:
        click.echo(json.dumps(bench_json(result), indent=1))
    else:
        print_bench(result)


class _Checkpoint:
    recipe = None

    def __init__(self, model: str) -> None:
        from klquant.checkpoint.hub import resolve_model
        from klquant.checkpoint.quantized import QuantizedReader
        from klquant.engine.sizes import Outline

        self.name, self.reader = model, QuantizedReader.open(resolve_model(model, weights=True))
        self.outline = Outline.of(self.reader)

    def load(self, placement: "Placement", dtype: "torch.dtype", notes) -> "EngineWeights":
        from klquant.engine.load import load_weights

        return load_weights(self.reader, placement, dtype, notes.progress)


class _Synthetic:
    def __init__(self, text: str, recipe: str) -> None:
        from klquant.engine.synthetic import parse_synthetic, synthetic_outline

        self.name, self.recipe = text, recipe
        config, layers = parse_synthetic(text)
        self.outline = synthetic_outline(config, recipe, layers)

    def load(self, placement: "Placement", dtype: "torch.dtype", notes) -> "EngineWeights":
        from klquant.engine.synthetic import random_weights

        return random_weights(self.outline, placement, dtype)
