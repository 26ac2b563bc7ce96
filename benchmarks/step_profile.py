"""Where a decode step's and a prompt's time goes: kernels by name, on a GPU, with random weights of the 48B's shapes.

    PYTHONPATH=. python3 -m benchmarks.step_profile [--layers 8] [--batch 1,8,32] [--context 128] [--prefill 2048]

"wall" is from step to step without the profiler; "busy" the sum of the kernels' own times, "span" from the first
kernel's start to the last one's end: span less busy is what lies between kernels, wall less span the host's.
"""

from collections import defaultdict

import click
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from klquant.engine import bench
from klquant.engine.load import place
from klquant.engine.placement import find_devices
from klquant.engine.runner import Runner
from klquant.engine.sizes import held_sizes
from klquant.engine.synthetic import parse_synthetic, random_weights, synthetic_outline
from klquant.kernels.mla.pages import PAGE_SIZE

STEPS = 8


def kernels(work) -> tuple[dict[str, tuple[int, float]], float]:
    """Kernels that `work()` launches: calls and µs by name, and the µs from the first one's start to the last's end."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as prof:
        work()
        torch.cuda.synchronize()
    found: dict[str, tuple[int, float]] = defaultdict(lambda: (0, 0.0))
    events = [e for e in prof.events() if e.device_type == DeviceType.CUDA]
    for event in events:
        calls, us = found[event.name]
        found[event.name] = (calls + 1, us + event.time_range.elapsed_us())
    span = max(e.time_range.end for e in events) - min(e.time_range.start for e in events)
    return dict(found), span


def report(title: str, found: dict[str, tuple[int, float]], span: float, times: int, wall_us: float, top: int) -> None:
    busy = sum(us for _, us in found.values())
    count = sum(calls for calls, _ in found.values())
    print(f"\n{title}: wall {wall_us:,.0f} µs, span {span / times:,.0f}, busy {busy / times:,.0f}, "
          f"{count / times:,.0f} launches")  # fmt: skip
    rows = sorted(found.items(), key=lambda item: -item[1][1])
    for name, (calls, us) in rows[:top]:
        print(f"  {us / times:>9,.1f} µs {us / busy:>5.0%} {calls / times:>6.0f} × {us / calls:>8.1f}  {name[:90]}")
    rest = sum(us for _, (_, us) in rows[top:])
    print(f"  {rest / times:>9,.1f} µs {rest / busy:>5.0%}         {max(0, len(rows) - top)} others")


@click.command(help=__doc__)
@click.option("--layers", default=27, show_default=True)
@click.option("--recipe", default="int4", show_default=True)
@click.option("--batch", default="1,8,32", show_default=True)
@click.option("--context", default="128", show_default=True)
@click.option("--prefill", default="2048,8192", show_default=True)
@click.option("--cache-bits", default=16, show_default=True)
@click.option("--top", default=16, show_default=True)
def main(layers: int, recipe: str, batch: str, context: str, prefill: str, cache_bits: int, top: int) -> None:
    batches, contexts, prompts = ([int(n) for n in text.split(",") if n] for text in (batch, context, prefill))
    torch.set_grad_enabled(False)
    config, layers = parse_synthetic(f"kimi-linear-48b:layers={layers}")
    outline, devices = synthetic_outline(config, recipe, layers), find_devices("cuda:0")
    cells = bench.Cells(tuple(prompts), tuple(batches), tuple(contexts), 64)
    needs = {"context": cells.most_cached, "sequences": max((1, *batches)), "cache_bits": cache_bits}
    placement = place(outline, devices, torch.bfloat16, **needs)
    runner = Runner(
        random_weights(outline, placement, torch.bfloat16), slots=placement.memory.sequences,
        pages=placement.memory.context // PAGE_SIZE, max_context=cells.longest, cache_bits=cache_bits,
    )  # fmt: skip
    bench.fill_with_noise(runner)
    sizes = held_sizes(outline, torch.bfloat16, placement.packed)
    print(f"{torch.cuda.get_device_name()}, {layers} layers, {recipe}")
    for ctx in contexts:
        for b in batches:
            row = bench.measure_decode(runner, sizes, b, ctx, 64, cache_bits)
            slots = bench.prepare(runner, b, ctx, 64)
            found, span = kernels(lambda slots=slots: [runner.decode(slots, "greedy") for _ in range(STEPS)])
            report(f"decode, batch {b}, context {ctx}", found, span, STEPS, row.step_s * 1e6, top)
    for n in prompts:
        row = bench.measure_prefill(runner, n)
        found, span = kernels(lambda n=n: bench.measure_prefill(runner, n))
        report(f"prefill of {n}", found, span, 1 + bench.REPEATS, row.first_token_s * 1e6, top)


if __name__ == "__main__":
    main()
