"""How fast one machine evaluates Kimi-Linear-48B layer by layer, without its checkpoint.

    python -m benchmarks.evaluate_scale FOLDER       # 9 layers at full width, 128 × 2,048 tokens, 20 GiB; 9 GB of disk

A checkpoint of noise, the first layers of the 48B, is written into FOLDER (or found there) and passed as `klquant eval`
passes a reference that does not fit: a layer read, all windows of a round through it, the next one read meanwhile; then
head, top tokens and samples of every distribution. Before that a batch passes the first layer of each kind, which
builds and tunes kernels. Seconds by layer and by kind of layer, peak memory, and what follows for 27 layers.
"""

import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import click
import torch

from benchmarks.quantize_scale import GIB, HostPeak
from benchmarks.synthetic import bytes_of, kind_of, make_config, open_checkpoint
from klquant.checkpoint.config import KimiLinearConfig
from klquant.checkpoint.quantized import QuantizedReader
from klquant.core.allocator import grow_segments
from klquant.evaluate import trace
from klquant.evaluate.score import reference_window
from klquant.evaluate.source import DeviceSource
from klquant.evaluate.trace import Runner
from klquant.model.weights import LayerWeights


class TimedRunner(Runner):
    """A runner that says of each layer, each time it was read, how long that took, how long the windows waited for it
    and how long they took to pass."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.resident = False  # as the whole model would be read
        self.rows: list[tuple[int, float, float, float]] = []  # layer, seconds of reading, waiting and passing
        self._read: dict[int, float] = {}

    def layer(self, layer: int) -> LayerWeights:
        began = self._now()
        w = super().layer(layer)
        self._read[layer] = self._now() - began
        return w

    def each_layer(self, work: Callable[[int, LayerWeights], None]) -> None:
        since = self._now()

        def timed(layer: int, w: LayerWeights) -> None:
            nonlocal since
            began = self._now()
            work(layer, w)
            ended = self._now()
            row = layer, self._read[layer], began - since, ended - began
            self.rows.append(row)
            kind, since = kind_of(self.config, layer), ended
            print("  layer {} ({}): reading {:.2f} s, waiting {:.2f} s, passing {:.2f} s".format(layer, kind, *row[1:]),
                  flush=True)  # fmt: skip

        super().each_layer(timed)

    def warm_up(self, ids_BS: torch.Tensor) -> None:
        """A batch through the first layer of each kind."""
        kinds = [kind_of(self.config, layer) for layer in range(self.config.num_layers)]
        for kind in dict.fromkeys(kinds):
            w = self.layer(kinds.index(kind))
            with torch.no_grad():
                self._pass(w, kinds.index(kind), trace.Trace(list(range(len(ids_BS))), self._embed(ids_BS)))
            del w

    def _now(self) -> float:
        """When the work of this thread is done."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        return time.perf_counter()


def by_kind(config: KimiLinearConfig, rows: list[tuple[int, float, float, float]]) -> dict[str, list[float]]:
    """Mean seconds of reading, waiting and passing of a layer of each kind, all its rounds together."""
    sums = defaultdict(lambda: [0.0, 0.0, 0.0])
    for layer, *seconds in rows:
        kind = kind_of(config, layer)
        sums[kind] = [a + b for a, b in zip(sums[kind], seconds, strict=True)]
    layers = Counter(kind_of(config, layer) for layer in range(config.num_layers))
    return {kind: [total / layers[kind] for total in totals] for kind, totals in sums.items()}


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--layers", default=9, show_default=True, help="The first layers of the model.")
@click.option("--windows", default=128, show_default=True)
@click.option("--window", default=2048, show_default=True, help="Tokens a window.")
@click.option("--gpu-memory", default=20.0, show_default=True, help="Cap on the card, in GiB, CUDA's own included.")
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--small", is_flag=True, help="Narrow layers, few experts: to try the benchmark out.")
def main(folder, layers, windows, window, gpu_memory, device, small):
    grow_segments()  # as the command line does
    device = torch.device(device)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_per_process_memory_fraction(gpu_memory * GIB / torch.cuda.mem_get_info(device)[1], device.index)
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name(device) if cuda else 'CPU'}", flush=True)
    began = time.perf_counter()
    files = open_checkpoint(folder / ("small" if small else "model"), make_config(layers, small), device, small)
    nbytes, stored = (n / 1e9 for n in bytes_of(files.tensors))
    print(
        f"checkpoint of {nbytes:.1f} GB ({stored:.1f} GB on the disk), {time.perf_counter() - began:.0f} s", flush=True
    )
    whole = KimiLinearConfig.from_dict(make_config(None, small), "48b")
    reader = QuantizedReader(files, None)
    runner = TimedRunner(DeviceSource(reader, device), torch.bfloat16 if cuda else torch.float32, device)
    ids_WS = torch.randint(whole.vocab_size, (windows, window), generator=torch.Generator().manual_seed(0))
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    print("one batch, which builds and tunes kernels", flush=True)
    runner.warm_up(ids_WS[runner.batches(ids_WS)[0]])
    print(f"{windows} × {window} tokens", flush=True)
    head, began = 0.0, time.perf_counter()
    with HostPeak() as host:
        for batch in runner.run(ids_WS, runner.batches(ids_WS)):
            since = time.perf_counter()
            for i, row in enumerate(batch.windows):
                record = reference_window(runner, batch, i, ids_WS[row], "topk")
                assert record["nll"].isfinite().all(), "noise must score as noise"
            head += time.perf_counter() - since
    seconds, tokens = time.perf_counter() - began, windows * window
    kinds = by_kind(reader.config, runner.rows)
    print(f"{'seconds a layer':<18}{'reading':>9}{'waiting':>9}{'passing':>9}")
    for kind, seconds_each in kinds.items():
        print(f"{kind:<18}" + "".join(f"{x:>9.2f}" for x in seconds_each))
    counts = Counter(kind_of(whole, layer) for layer in range(whole.num_layers))
    each = {kind: waiting + passing for kind, (_, waiting, passing) in kinds.items()}
    total = sum(n * each.get(kind, max(each.values())) for kind, n in counts.items()) + head
    peak = f"{torch.cuda.max_memory_reserved(device) / GIB:.2f} GiB on the card (torch, reserved), " if cuda else ""
    print("\nsummary")
    print(f"{tokens:,} tokens through {layers} layers in {seconds:.1f} s, {head:.1f} s of it head and distributions")
    print(f"peaks: {peak}{host.most / 1e9:.2f} GB on the host")
    print(f"EXTRAPOLATED to {whole.num_layers} layers: {total:.0f} s, {tokens / total:,.0f} tokens/s")


if __name__ == "__main__":
    sys.exit(main())
