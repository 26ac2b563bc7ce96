"""`klquant bench MODEL`: how fast the engine is here, what memory it takes, and how near the bandwidth it comes."""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

import klquant
from klquant.cli.engine import DeviceSizes
from klquant.recipe.schema import DEFAULT_RECIPE

if TYPE_CHECKING:
    import torch

    from klquant.engine.bench import Cells, Decode, Prefill
    from klquant.engine.ceilings import Ceilings
    from klquant.engine.placement import Placement
    from klquant.engine.sizes import Outline
    from klquant.engine.usage import Usage
    from klquant.engine.weights import EngineWeights

JSON_SCHEMA = 1
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


@dataclass(frozen=True)
class Bench:
    """Everything that was measured. `decode` has None for a cell whose cache does not fit."""

    model: str
    recipe: str | None
    devices: tuple[str, ...]
    dtype: str
    cache_bits: int
    load_s: float
    notes: tuple[str, ...]
    usage: "list[Usage]"
    ceilings: "Ceilings"
    prefill: "list[Prefill]"
    decode: "dict[tuple[int, int], Decode | None]"


@click.command("bench")
@click.argument("model", required=False, type=click.Path(path_type=Path))
@click.option("--synthetic", metavar="NAME[:layers=N]",
              help="Instead of MODEL: random weights of a known shape, kimi-linear-48b.")  # fmt: skip
@click.option("--recipe", help=f"With --synthetic: what the weights are stored as.  [default: {DEFAULT_RECIPE}]")
@click.option("--devices", metavar="NAMES", help="cuda:0,cuda:1 or cpu.  [default: all GPUs, or the CPU]")
@click.option("--max-memory", type=DeviceSizes(), metavar="SIZES",
              help="What devices may use at most: cuda:0=20GiB,cuda:1=11GiB.  [default: what is free]")  # fmt: skip
@click.option("--cache-bits", type=click.Choice(["16", "8"]), default="16", show_default=True,
              help="Bits of a latent in the cache.")  # fmt: skip
@click.option("--prefill", type=Numbers(), help="Prompt lengths, such as 512,16k; 0 for none.  [default: by device]")
@click.option("--batch", type=Numbers(), help="Sequences that decode together.  [default: by device]")
@click.option("--context", type=Numbers(), help="Tokens each of them holds.  [default: by device]")
@click.option("--steps", type=click.IntRange(1), help="Decode steps to time.  [default: by device]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
def command(
    model: Path | None, synthetic: str | None, recipe: str | None, devices: str | None,
    max_memory: dict[str, int] | None, cache_bits: str, prefill: tuple[int, ...] | None,
    batch: tuple[int, ...] | None, context: tuple[int, ...] | None, steps: int | None, as_json: bool,
) -> None:  # fmt: skip
    """Time prefill and decode of MODEL, a checkpoint folder in 16 bits or quantized, with random tokens.

    Shows time to first token, tokens a second, memory by part as predicted and as it is, and the bytes a step moves as
    a share of what a copy reaches. With --synthetic no checkpoint is needed.
    """
    if (model is None) == (synthetic is None):
        raise click.UsageError("give either MODEL or --synthetic NAME")
    if recipe and not synthetic:
        raise click.UsageError("--recipe goes with --synthetic; a checkpoint is what it is")
    from klquant.cli.bench_table import Notes, print_bench
    from klquant.engine.bench import Cells
    from klquant.engine.engine import default_devices
    from klquant.engine.placement import find_devices

    found = find_devices(devices or default_devices(), max_memory)
    kind = next(iter(found)).type
    given = (prefill, batch, context, steps)
    cells = Cells(*(default if value is None else value for value, default in zip(given, DEFAULTS[kind], strict=True)))
    with Notes(quiet=as_json) as notes:
        if kind == "cpu":
            notes.note("no GPU: this times the plain torch path, which is slow and only meant to work everywhere")
        source = _Checkpoint(model) if model else _Synthetic(synthetic, recipe or DEFAULT_RECIPE)
        result = run(source, found, cells, int(cache_bits), notes)
    if as_json:
        click.echo(json.dumps(bench_json(result), indent=1))
    else:
        print_bench(result)


class _Checkpoint:
    recipe = None

    def __init__(self, folder: Path) -> None:
        from klquant.checkpoint.quantized import QuantizedReader
        from klquant.engine.sizes import Outline

        self.name, self.reader = str(folder), QuantizedReader.open(folder)
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


def run(source, devices: "dict[torch.device, int]", cells: "Cells", cache_bits: int, notes) -> Bench:
    """Load, then measure every cell that fits."""
    import torch

    from klquant.engine import bench
    from klquant.engine.ceilings import Ceilings, copy_rate, launch_seconds
    from klquant.engine.load import default_dtype
    from klquant.engine.runner import Runner
    from klquant.engine.sizes import held_sizes
    from klquant.engine.usage import measured_usage
    from klquant.kernels.mla.pages import PAGE_SIZE

    outline, dtype, first = source.outline, default_dtype(devices), next(iter(devices))
    cells = cells.within(outline.config)
    placement = _place(outline, devices, dtype, cells, cache_bits)
    copy_bytes_s = copy_rate(first)
    if first.type == "cuda":
        torch.cuda.empty_cache()
    started = time.perf_counter()
    weights = source.load(placement, dtype, notes)
    load_s = time.perf_counter() - started
    cached = placement.memory.context
    runner = Runner(
        weights, slots=placement.memory.sequences, pages=cached // PAGE_SIZE,
        max_context=min(cells.longest, cached), cache_bits=cache_bits,
    )  # fmt: skip
    bench.fill_with_noise(runner)
    launches = bench.count_launches(runner)
    ceilings = Ceilings(copy_bytes_s, launch_seconds(first) if launches else None, launches)
    for device in weights.devices:
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
    prefill = []
    for n in cells.prefill:
        if n < cached:
            notes.status(f"prefill of {n:,} tokens")
            prefill.append(bench.measure_prefill(runner, n))
    sizes, decode = held_sizes(outline, dtype, placement.packed), {}
    for context in cells.context:
        for batch in cells.batch:
            notes.status(f"decode of {batch} at {context:,} tokens")
            fits = cells.cached(batch, context) <= cached
            decode[context, batch] = (
                bench.measure_decode(runner, sizes, batch, context, cells.steps, cache_bits) if fits else None
            )
    latent, kda = ([getattr(stage.state, name) for stage in runner.stages] for name in ("latent", "kda"))
    return Bench(
        source.name, source.recipe, tuple(map(_device_name, weights.devices)), str(dtype).removeprefix("torch."),
        cache_bits, load_s, weights.notes, measured_usage(placement, weights, latent, kda), ceilings, prefill, decode,
    )  # fmt: skip


def _place(
    outline: "Outline", devices: "dict[torch.device, int]", dtype: "torch.dtype", cells: "Cells", cache_bits: int
) -> "Placement":
    """Room for all cells, or else for as much cache as there can be."""
    from klquant.engine.load import place
    from klquant.engine.placement import CONTEXT_STEP, longest_context
    from klquant.engine.sizes import held_sizes
    from klquant.errors import UserError

    needs = {"context": cells.most_cached, "sequences": max((1, *cells.batch)), "cache_bits": cache_bits}
    try:
        return place(outline, devices, dtype, **needs)
    except UserError:
        sizes = held_sizes(outline, dtype)
        most = longest_context(outline.config, sizes, devices, **needs, activation_bytes=dtype.itemsize)
        return place(outline, devices, dtype, **needs | {"context": max(most, CONTEXT_STEP)})


def _device_name(device: "torch.device") -> str:
    import torch

    return f"{device} {torch.cuda.get_device_name(device)}" if device.type == "cuda" else "cpu"


def bench_json(result: Bench) -> dict:
    """For machines. Bytes, seconds; `rtx_4090_predicted_tokens_s` is a prediction and null on a CPU."""
    decode = []
    for (context, batch), row in result.decode.items():
        if row is None:
            decode.append({"batch": batch, "context": context, "fits": False})
            continue
        card = predicted_tokens_s(result.ceilings, row)
        decode.append({
            "batch": batch, "context": context, "fits": True, "steps": row.steps, "step_s": row.step_s,
            "tokens_s": row.tokens_s, "bytes_moved": asdict(row.traffic) | {"total": row.traffic.total},
            "of_copy": row.bytes_s / result.ceilings.copy_bytes_s, "rtx_4090_predicted_tokens_s": card,
        })  # fmt: skip
    return {
        "schema": JSON_SCHEMA,
        "klquant": klquant.__version__,
        "model": result.model,
        "recipe": result.recipe,
        "devices": list(result.devices),
        "dtype": result.dtype,
        "cache_bits": result.cache_bits,
        "load_s": result.load_s,
        "notes": list(result.notes),
        "memory": [asdict(u) | {"device": str(u.device)} for u in result.usage],
        "ceilings": asdict(result.ceilings),
        "prefill": [asdict(p) | {"tokens_s": p.tokens_s} for p in result.prefill],
        "decode": decode,
    }


def predicted_tokens_s(ceilings: "Ceilings", row: "Decode") -> float | None:
    """What an RTX 4090 would reach in this cell, if it has the memory."""
    from klquant.engine.ceilings import RTX_4090

    seconds = ceilings.predict(row.traffic.total, row.step_s, RTX_4090)
    return None if seconds is None else row.batch / seconds
