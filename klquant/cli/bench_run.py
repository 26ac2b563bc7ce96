"""What `klquant bench` does between its options and its tables: place, load, measure, and say it in JSON."""

import time
from contextlib import suppress
from dataclasses import asdict, dataclass

import torch

import klquant
from klquant.engine import bench
from klquant.engine.bench import Cells, Decode, Prefill
from klquant.engine.ceilings import RTX_4090, Ceilings, copy_rate, launch_seconds
from klquant.engine.load import default_dtype, place
from klquant.engine.placement import Placement
from klquant.engine.runner import Runner
from klquant.engine.sizes import Outline, held_sizes
from klquant.engine.usage import Usage, measured_usage
from klquant.errors import UserError
from klquant.kernels.mla.pages import PAGE_SIZE
from klquant.model.first_prompt import building_note

JSON_SCHEMA = 1


@dataclass(frozen=True)
class Bench:
    """Everything that was measured. `prefill` by tokens, `decode` by (context, batch); None: the cache does not fit."""

    model: str
    recipe: str | None
    devices: tuple[str, ...]
    dtype: str
    cache_bits: int
    load_s: float
    notes: tuple[str, ...]
    usage: list[Usage]
    ceilings: Ceilings
    prefill: dict[int, Prefill | None]
    decode: dict[tuple[int, int], Decode | None]


def run(source, devices: dict[torch.device, int], cells: Cells, cache_bits: int, host: int, notes) -> Bench:
    """Load, then measure every cell that fits. host: bytes of experts that may lie in the host's memory."""
    outline, dtype, first = source.outline, default_dtype(devices), next(iter(devices))
    wanted, cells = cells, cells.within(outline.config)
    if cells != wanted:
        notes.note(f"left out what is beyond the model's own context of {outline.config.max_context:,} tokens")
    placement = _place(outline, devices, dtype, cells, cache_bits, host)
    if cells.prefill and (said := building_note(first, dtype)):
        notes.note(said)
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
    # With experts in the host's memory another card's time is not a matter of its own bytes and launches.
    launches = None if placement.offloaded else bench.count_launches(runner)
    ceilings = Ceilings(copy_bytes_s, launch_seconds(first) if launches else None, launches)
    for device in weights.devices:
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
    prefill, decode = {}, {}
    for n in cells.prefill:
        notes.status(f"prefill of {n:,} tokens")
        prefill[n] = bench.measure_prefill(runner, n) if n < cached else None
    sizes = held_sizes(outline, dtype, placement.packed)
    for context in cells.context:
        for batch in cells.batch:
            notes.status(f"decode of {batch} at {context:,} tokens")
            fits = cells.cached(batch, context) <= cached
            decode[context, batch] = (
                bench.measure_decode(runner, sizes, batch, context, cells.steps, cache_bits) if fits else None
            )
    said = tuple(filter(None, (*weights.notes, placement.note)))
    usage = measured_usage(placement, weights, [stage.state for stage in runner.stages])
    return Bench(
        source.name, source.recipe, tuple(map(_device_name, weights.devices)), str(dtype).removeprefix("torch."),
        cache_bits, load_s, said, usage, ceilings, prefill, decode,
    )  # fmt: skip


def _place(
    outline: Outline, devices: dict[torch.device, int], dtype: torch.dtype, cells: Cells, cache_bits: int, host: int
) -> Placement:
    """Room for the largest cell that fits, and so for all smaller ones. Not for all the cache there can be: the
    embedding may have to leave the GPU for that, at the cost of each step of every cell. Where not even the smallest
    does, experts give way to it, and to larger ones as long as those are not twice as many."""
    needs = {"sequences": max((1, *cells.batch)), "cache_bits": cache_bits}
    for tokens in cells.caches:
        with suppress(UserError):
            return place(outline, devices, dtype, context=tokens, **needs)
    found = place(outline, devices, dtype, context=cells.caches[-1], host=host, **needs)
    for tokens in cells.caches:
        with suppress(UserError):
            return place(outline, devices, dtype, context=tokens, host=min(host, 2 * found.offloaded), **needs)
    return found


def _device_name(device: torch.device) -> str:
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
            "experts_chosen": row.offloaded and row.offloaded.chosen,
            "experts_not_on_gpu": row.offloaded and row.offloaded.missing,
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
        "prefill": [
            {"tokens": n, "fits": p is not None} | (asdict(p) | {"tokens_s": p.tokens_s} if p else {})
            for n, p in result.prefill.items()
        ],
        "decode": decode,
    }


def predicted_tokens_s(ceilings: Ceilings, row: Decode) -> float | None:
    """What an RTX 4090 would reach in this cell, if it has the memory."""
    seconds = ceilings.predict(row.traffic.total, row.step_s, RTX_4090)
    return None if seconds is None else row.batch / seconds
