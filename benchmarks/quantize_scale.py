"""How long one machine takes to quantize Kimi-Linear-48B, without its checkpoint.

    python -m benchmarks.quantize_scale --layers 8

First the kernels beside the plain functions at the experts' real shapes (right, then fast), then whole layers of noise
through the project's own `LayerWalk`: seconds by phase and kind of layer, peak memory, extrapolation to 27 layers.
"""

import re
import resource
import sys
import time
from collections import Counter, defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field

import click
import torch

from benchmarks.quantize_kernels import compare
from benchmarks.synthetic import (
    kind_of,
    layer_of,
    make_config,
    synthetic_layer,
    synthetic_metric,
    synthetic_plan,
    synthetic_streams,
)
from klquant.calibrate.walk import LayerWalk, WalkSettings
from klquant.pipeline.run import BATCH_TOKENS


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass
class Clock:
    """Seconds spent under each label; the device is waited for whenever the label changes."""

    device: torch.device
    label: str = "other"
    since: float = field(default_factory=time.perf_counter)
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    def switch(self, label: str) -> None:
        if label == self.label:
            return
        synchronize(self.device)
        now = time.perf_counter()
        self.seconds[self.label] += now - self.since
        self.label, self.since = label, now

    @contextmanager
    def under(self, label: str):
        before = self.label
        self.switch(label)
        yield
        self.switch(before)


class TimedWalk(LayerWalk):
    """A layer's walk that says what it is doing."""

    clock: Clock

    def fit(self, paths, *rest, **named):
        with self.clock.under(f"fit {paths[0]}"):
            super().fit(paths, *rest, **named)


def walk_layer(config, plan, layer, settings, streams, gen) -> dict[str, float]:
    """One layer of noise, start to end: seconds by phase."""
    weights = synthetic_layer(config, layer, settings.dtype, settings.device, gen)
    synchronize(settings.device)
    clock = Clock(settings.device)

    def progress(phase: str, _: float) -> None:
        clock.switch(re.sub(r"experts \d+–\d+", "experts", phase))

    share = plan.recipe.gptq.router_share
    metric = synthetic_metric(config, share, settings.device, gen) if share else None
    walk = TimedWalk(config, layer, weights, plan, settings, streams, progress, (metric, metric))
    walk.clock = clock
    result = walk.run()
    clock.switch("end")
    errors = [r.error for r in result.records.values()]
    assert len(errors) and all(0 <= e < 1 for e in errors), "a layer's relative errors make no sense"
    return dict(clock.seconds)


def table(rows: dict[str, dict[str, float]]) -> str:
    phases = list(dict.fromkeys(p for seconds in rows.values() for p in seconds))
    lines = [f"{'seconds':<24}" + "".join(f"{kind:>12}" for kind in rows)]
    lines += [f"{p:<24}" + "".join(f"{s.get(p, 0.0):>12.2f}" for s in rows.values()) for p in phases]
    lines.append(f"{'a layer':<24}" + "".join(f"{sum(s.values()):>12.2f}" for s in rows.values()))
    return "\n".join(lines)


def host_peak() -> float:
    """GB the process had in memory at most (page cache not counted)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def extrapolate(config, means: dict[str, dict[str, float]]) -> str:
    """Seconds for all layers, from the kinds that were measured; an unmeasured kind counts as the slowest measured."""
    kinds = Counter(kind_of(config, layer) for layer in range(config.num_layers))
    totals = {kind: sum(seconds.values()) for kind, seconds in means.items()}
    each = {kind: totals.get(kind, max(totals.values())) for kind in kinds}
    total = sum(count * each[kind] for kind, count in kinds.items())
    parts = ", ".join(
        f"{n} × {kind} at {each[kind]:.1f} s{'' if kind in totals else ' (not measured)'}" for kind, n in kinds.items()
    )
    return f"EXTRAPOLATED, not measured: {total:.0f} s = {total / 60:.1f} min for {config.num_layers} layers ({parts})"


@click.command(help=__doc__)
@click.option("--layers", default=8, show_default=True, help="Layers to walk; 0: kernels only.")
@click.option("--kinds", default="kda,kda,kda,mla", show_default=True, help="Kinds taken in turn: kda, mla, dense.")
@click.option("--windows", default=512, show_default=True)
@click.option("--window", default=2048, show_default=True, help="Tokens a window.")
@click.option("--recipe", default="int4", show_default=True)
@click.option("--batch-tokens", type=int, help="Tokens worked on at once (default: what a run takes).")
@click.option("--expert-chunk", default=16, show_default=True, help="Experts whose moments are held at once.")
@click.option("--gpu-memory", type=float, help="Cap on the GPU memory of this process, in GiB.")
@click.option("--kernels/--no-kernels", default=True, show_default=True, help="Compare kernels and plain functions.")
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--small", is_flag=True, help="Narrow layers, few experts: to try the benchmark out.")
def main(layers, kinds, windows, window, recipe, batch_tokens, expert_chunk, gpu_memory, kernels, device, small):
    device = torch.device(device)
    cuda = device.type == "cuda"
    if gpu_memory:
        torch.cuda.set_per_process_memory_fraction(gpu_memory * 2**30 / torch.cuda.mem_get_info()[1])
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if cuda else 'CPU'}")
    gen = torch.Generator(device).manual_seed(0)
    config = make_config(small)
    torch.set_grad_enabled(False)
    if kernels and cuda and not small:
        for shape in ((config.num_experts, 2048, 2304), (config.num_experts, 2304, 1024)):
            print(compare(*shape, gen), flush=True)
    if not layers:
        return
    dtype = torch.bfloat16 if cuda else torch.float32
    settings = WalkSettings(device, dtype, max(1, (batch_tokens or BATCH_TOKENS[device.type]) // window), expert_chunk)
    plan = synthetic_plan(config, recipe)
    streams = synthetic_streams(config, windows, window, dtype, device, gen)
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    print(f"{layers} layers, {recipe}, {windows} × {window} tokens, {expert_chunk} experts at once", flush=True)
    cycle, seconds = kinds.split(","), defaultdict(list)
    for i in range(layers):
        kind = cycle[i % len(cycle)]
        seconds[kind].append(walk_layer(config, plan, layer_of(config, kind), settings, streams, gen))
        print(f"  {kind}: {sum(seconds[kind][-1].values()):.2f} s", flush=True)
    # The first layer of a kind builds kernels: it stands for the others only when it is alone.
    means = {}
    for kind, runs in seconds.items():
        kept = runs[1:] or runs
        means[kind] = {phase: sum(r.get(phase, 0.0) for r in kept) / len(kept) for phase in kept[0]}
    print(table(means))
    peak = f"{torch.cuda.max_memory_reserved() / 2**30:.1f} GiB reserved by torch on the GPU, " if cuda else ""
    print(f"peaks: {peak}{host_peak():.1f} GB on the host; no file was read or written")
    print(extrapolate(config, means))


if __name__ == "__main__":
    sys.exit(main())
