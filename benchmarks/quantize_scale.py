"""How long one machine takes to quantize Kimi-Linear-48B, without its checkpoint.

    python -m benchmarks.quantize_scale FOLDER       # 9 layers at full width, 512 × 2,048 tokens, 24 GiB; 38 GB on disk

Kernels beside the plain functions at the experts' real shapes (right, then fast); then a checkpoint of noise, the first
layers of the 48B, is written into FOLDER and quantized by the pipeline itself, from files to files: seconds by phase
and kind of layer, peak memory, bytes, and what follows for 27 layers. Layers of a kind share their bytes on the disk
(9 GB in all) and each reads them from there, past the page cache.
"""

import hashlib
import re
import resource
import shutil
import sys
import threading
import time
from collections import Counter, defaultdict
from pathlib import Path
from unittest.mock import patch

import click
import torch

from benchmarks.quantize_kernels import compare, compare_grouped
from benchmarks.synthetic import bytes_of, kind_of, make_config, noise_text, open_checkpoint
from klquant.checkpoint.config import KimiLinearConfig
from klquant.checkpoint.reader import CheckpointReader
from klquant.core.allocator import grow_segments
from klquant.core.memory import free_memory
from klquant.pipeline.placement import Limits
from klquant.pipeline.report import Silent, Traffic
from klquant.pipeline.run import RunOptions, quantize
from klquant.recipe.plan import Plan, make_plan
from klquant.recipe.schema import load_recipe

GIB = 1 << 30
COMPARED = 64  # experts at once in the comparison of kernels; the plain functions take seconds for each step


class Clock(Silent):
    """A watcher that adds up seconds by unit and phase; the device is waited for whenever the phase changes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
        self.traffic: Traffic | None = None
        self.fallbacks: list[str] = []
        self._at, self._since = ("", ""), time.perf_counter()

    def phase(self, unit: str, phase: str, fraction: float) -> None:
        self._switch((unit, re.sub(r"experts \d+–\d+", "experts", phase)))

    def done(self, unit) -> None:
        self.fallbacks += unit.fallbacks

    def end(self, traffic: Traffic) -> None:
        self._switch(("", ""))
        self.traffic = traffic

    def note(self, text: str) -> None:
        print(f"  {text}", flush=True)

    def _switch(self, at: tuple[str, str]) -> None:
        if at == self._at:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        unit, phase = self._at
        self.seconds[unit][phase] += now - self._since
        if unit and unit != at[0]:
            print(f"  {unit}: {sum(self.seconds[unit].values()):.1f} s", flush=True)
        self._at, self._since = at, now

    def units(self) -> dict[str, float]:
        """Seconds of each unit, calibration text and what lies between units left out."""
        return {unit: sum(s.values()) for unit, s in self.seconds.items() if unit not in ("", "calibration")}


class HostPeak:
    """The most memory of this process that is no file's, sampled while the block runs, in bytes."""

    def __enter__(self) -> "HostPeak":
        self.most, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(0.1):
            self.most = max(self.most, anonymous_memory())


def anonymous_memory() -> int:
    """Bytes of host memory of this process beside mapped files; the peak of all where the system does not tell."""
    try:
        rows = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(rows["RssAnon"].split()[0]) * 1024
    except (OSError, KeyError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def plan_of(reader: CheckpointReader, recipe: str, tokens: int, window: int) -> Plan:
    chosen = load_recipe(recipe)
    params = chosen.calibration.model_copy(
        update={"tokens": tokens, "max_tokens": tokens, "window": window, "min_expert_tokens": 0}
    )
    shapes = {name: (info.dtype, info.shape) for name, info in reader.tensors.items()}
    return make_plan(chosen.model_copy(update={"calibration": params}), reader.config, shapes)


def run(reader: CheckpointReader, recipe: str, out: Path, windows: int, window: int, options: RunOptions) -> "Result":
    """One run of the pipeline into `out`, which is removed again."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(out.with_name(out.name + ".unfinished"), ignore_errors=True)
    device = torch.device(options.device.partition(",")[0])
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    clock, plan = Clock(device), plan_of(reader, recipe, windows * window, window)
    text = noise_text(reader.config, windows, window)
    print(f"{recipe}: {reader.config.num_layers} layers, {windows} × {window} tokens, {options.device}", flush=True)
    began = time.perf_counter()
    with HostPeak() as host, patch("klquant.pipeline.run.draw_text", lambda *_: text):
        provenance = quantize(reader, plan, out, options, clock)
    return Result(recipe, clock, time.perf_counter() - began, host.most, device, provenance)


class Result:
    """What a run took, and what it wrote."""

    def __init__(self, recipe: str, clock: Clock, seconds: float, host: int, device: torch.device, provenance: dict):
        self.recipe, self.clock, self.seconds, self.host = recipe, clock, seconds, host
        cuda = device.type == "cuda"
        self.used = torch.cuda.max_memory_allocated(device) if cuda else 0
        self.card = torch.cuda.max_memory_reserved(device) if cuda else 0
        self.retries = torch.cuda.memory_stats(device)["num_alloc_retries"] if cuda else 0
        hashes = [f"{file} {shard['sha256']}" for file, shard in sorted(provenance["shards"].items())]
        self.digest = hashlib.sha256("\n".join(hashes).encode()).hexdigest()[:16]

    def by_kind(self, config: KimiLinearConfig) -> dict[str, dict[str, float]]:
        """Mean seconds by phase for each kind of layer, without the first of a kind, which builds kernels."""
        layers = defaultdict(list)
        for layer in range(config.num_layers):
            layers[kind_of(config, layer)].append(self.clock.seconds[f"layer {layer}"])
        means = {}
        for kind, runs in layers.items():
            kept = runs[1:] or runs
            phases = dict.fromkeys(phase for seconds in kept for phase in seconds)
            means[kind] = {phase: sum(s.get(phase, 0.0) for s in kept) / len(kept) for phase in phases}
        return means

    def lines(self, config: KimiLinearConfig, whole: KimiLinearConfig) -> list[str]:
        traffic, units = self.clock.traffic, self.clock.units()
        layers = sum(s for unit, s in units.items() if unit.startswith("layer"))
        each = {kind: sum(phases.values()) for kind, phases in self.by_kind(config).items()}
        counts = Counter(kind_of(whole, layer) for layer in range(whole.num_layers))
        slowest = max(each.values())
        total = sum(n * each.get(kind, slowest) for kind, n in counts.items()) + sum(units.values()) - layers
        parts = ", ".join(
            f"{n} × {kind} {each.get(kind, slowest):.2f} s{'' if kind in each else ' (not measured)'}"
            for kind, n in counts.items()
        )
        return [
            f"{self.recipe}: {self.seconds:.1f} s in all, {layers:.1f} s in {config.num_layers} layers; stood still "
            f"{traffic.read_wait:.1f} s for reading, {traffic.write_wait:.1f} s for writing",
            f"  {traffic.read / 1e9:.1f} GB read, {traffic.written / 1e9:.1f} GB written; peaks: "
            f"{self.used / GIB:.2f} GiB in use and {self.card / GIB:.2f} GiB reserved on the card (torch), "
            f"{self.host / 1e9:.2f} GB on the host; {self.retries} times torch gave memory back to find room",
            f"  SHA-256 of all shards' SHA-256: {self.digest}",
            f"  EXTRAPOLATED to {whole.num_layers} layers: {total:.0f} s = {total / 60:.1f} min ({parts})",
            *(f"  fallback: {line}" for line in self.clock.fallbacks[:3]),
        ]


def table(rows: dict[str, dict[str, float]]) -> str:
    phases = list(dict.fromkeys(p for seconds in rows.values() for p in seconds))
    lines = [f"{'seconds a layer':<44}" + "".join(f"{kind:>9}" for kind in rows)]
    lines += [f"{p:<44}" + "".join(f"{s.get(p, 0.0):>9.2f}" for s in rows.values()) for p in phases]
    lines.append(f"{'all':<44}" + "".join(f"{sum(s.values()):>9.2f}" for s in rows.values()))
    return "\n".join(lines)


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--layers", default=9, show_default=True, help="The first layers of the model; 0: kernels only.")
@click.option("--windows", default=512, show_default=True)
@click.option("--window", default=2048, show_default=True, help="Tokens a window.")
@click.option("--recipes", default="int4,rtn-int4", show_default=True)
@click.option("--gpu-memory", default=24.0, show_default=True, help="Cap on a card, in GiB, CUDA's own included.")
@click.option("--cpu-memory", type=float, help="Cap on the host, in GB.")
@click.option("--kernels/--no-kernels", default=True, show_default=True, help="Compare kernels and plain functions.")
@click.option("--twice", is_flag=True, help="Run the first recipe again and compare the bytes.")
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True, help="Or several.")
@click.option("--small", is_flag=True, help="Narrow layers, few experts: to try the benchmark out.")
def main(folder, layers, windows, window, recipes, gpu_memory, cpu_memory, kernels, twice, device, small):
    grow_segments()  # as the command line does
    first = torch.device(device.partition(",")[0])
    cuda = first.type == "cuda"
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name(first) if cuda else 'CPU'}, "
          f"{free_memory() / 1e9:.0f} GB of host memory free", flush=True)  # fmt: skip
    whole = KimiLinearConfig.from_dict(make_config(None, small), "48b")
    torch.set_grad_enabled(False)
    summary = []
    if kernels and cuda and not small:
        gen = torch.Generator(first).manual_seed(0)
        summary += compare_grouped(whole, gen)
        for shape in ((COMPARED, 2048, 2304), (COMPARED, 2304, 1024)):
            print(compare(*shape, gen), flush=True)
        torch.cuda.empty_cache()
    if layers:
        raw, began = make_config(layers, small), time.perf_counter()
        reader = open_checkpoint(folder / ("small" if small else "model"), raw, first, small)
        nbytes, stored = (n / 1e9 for n in bytes_of(reader.tensors))
        print(f"checkpoint of {nbytes:.1f} GB ({stored:.1f} GB on the disk), {time.perf_counter() - began:.0f} s; "
              f"{shutil.disk_usage(folder).free / 1e9:.0f} GB of disk free", flush=True)  # fmt: skip
        limits = Limits(gpu=int(gpu_memory * GIB), cpu=None if cpu_memory is None else int(cpu_memory * 1e9))
        options, names = RunOptions(device=device, limits=limits), recipes.split(",")
        digests = {}
        for recipe in names + names[:1] * twice:
            result = run(reader, recipe, folder / "out", windows, window, options)
            print(table(result.by_kind(reader.config)), flush=True)
            summary += result.lines(reader.config, whole)
            if recipe in digests:
                summary.append(f"{recipe}, twice: {'equal' if digests[recipe] == result.digest else 'DIFFERENT'} bytes")
            digests[recipe] = result.digest
        shutil.rmtree(folder / "out", ignore_errors=True)
    print("\nsummary", *summary, sep="\n")


if __name__ == "__main__":
    sys.exit(main())
