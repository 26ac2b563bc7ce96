"""Time the kernels at the shapes of Kimi-Linear-48B, each only after its result was checked against FP64.

    PYTHONPATH=. python3 benchmarks/kernels.py [--only linear|experts] [--bits 4] [--tokens 1,16] [--sweep]
        [--peers BF16,gemlite] [--out kernels.json]

Times are of CUDA graph replays, divided by the calls in the graph; those walk over enough copies of the weight that
none is found in the L2 cache. GB/s counts the least an operation must move: packed weights it uses, inputs, outputs.
`--sweep` times every tile of a list and prints the fastest of each shape beside the table's: how the table is made.
Checks run in `--jobs` processes, which also fills Triton's cache.
`--peers` are other projects' kernels (benchmarks/kernel_peers.py), timed after all of ours: "all", "none" or names with
commas between them; all unless `--sweep`, then BF16. One that is absent or fails is listed with the reason.
"""

import argparse
import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from benchmarks import kernel_cases as kc
from benchmarks.kernel_cases import Case
from benchmarks.kernel_peers import BF16, PEERS, Timed, compile_gemlite, names_for, time_peer
from benchmarks.timing import copies_for, copy_rate, matmul_rate, time_us

# BF16 outputs, and of the experts BF16 activations in between.
MOST_ERROR = 5e-3
# Of the best peer's time: what counts as being first.
AS_FAST = 1.05


@dataclass(frozen=True)
class Row:
    case: Case
    error: float
    us: float
    gb_s: float
    of_copy: float
    tflop_s: float
    of_matmul: float
    peers: dict[str, Timed] = field(default_factory=dict, compare=False)

    @property
    def of_best(self) -> float | None:
        """Our time over that of the fastest peer."""
        times = [peer.us for peer in self.peers.values() if peer.us is not None]
        return self.us / min(times) if times else None


def measure(case: Case, error: float) -> Row:
    """Time one case. `error` is what its check found."""
    x = kc.inputs(case)
    if case.shape == kc.LAYER:
        w = kc.expert_weights(case.bits)
        routes = [kc.routing(case.tokens) for _ in range(16 if case.tokens <= 64 else 2)]
        us = time_us([lambda r=r: kc.run_experts(case, x, w, *r) for r in routes])
        used = sum(len(expert.unique()) for _, expert in routes) / len(routes)
        weights = (w.gate_up.nbytes + w.down.nbytes) * used / kc.EXPERTS
        nbytes = weights + w.shared.gate_up.nbytes + w.shared.down.nbytes + 4 * case.tokens * kc.HIDDEN
        flops = 2 * case.tokens * (kc.TOP + 1) * 3 * kc.HIDDEN * kc.INNER
    else:
        n, k, gated = kc.SHAPES[case.shape]
        w = kc.linear_weight(case.shape, case.bits)
        us = time_us([lambda w=w: kc.run_linear(case, x, w) for w in kc.copied(w, copies_for(w.nbytes))])
        nbytes = w.nbytes + 2 * case.tokens * (k + (n // 2 if gated else n))
        flops = 2 * n * k * case.tokens
    rate, speed = nbytes / us * 1e6, flops / us * 1e6
    return Row(case, error, us, rate / 1e9, rate / copy_rate(), speed / 1e12, speed / matmul_rate())


def with_peers(row: Row, names: tuple[str, ...]) -> Row:
    case = row.case
    found = {name: time_peer(name, case.shape, case.bits, case.tokens) for name in names_for(case, names)}
    return replace(row, peers=found)


def fastest(rows: list[Row]) -> list[Row]:
    """Of each shape the table's tile (listed first) and the fastest."""
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        found.setdefault((row.case.shape, row.case.bits, row.case.tokens), []).append(row)
    return [row for tried in found.values() for row in dict.fromkeys((tried[0], min(tried, key=lambda r: r.us)))]


def table(rows: list[Row], names: tuple[str, ...]) -> str:
    """A line a row: our time, each peer's (µs; "–": none, see `notes`), our time over the fastest peer's."""
    peers = "".join(f" {name:>8}" for name in names)
    lines = [
        f"{'':15} {'b':>2} {'M':>5} {'µs':>8}{peers} {'÷best':>5} {'GB/s':>5} {'copy':>5} {'matmul':>6} {'error':>7}"
    ]
    for r in rows:
        times = [r.peers[name].us if name in r.peers else "" for name in names]
        peers = "".join(f" {'–' if us is None else us if us == '' else f'{us:.1f}':>8}" for us in times)
        best = "" if r.of_best is None else f"{r.of_best:.2f}"
        tiles = "  ".join("/".join(str(v) for v in asdict(tile).values()) for tile in r.case.tiles)
        lines.append(
            f"{r.case.shape[:15]:15} {r.case.bits:2} {r.case.tokens:5} {r.us:8.1f}{peers} {best:>5} "
            f"{r.gb_s:5.0f} {r.of_copy:5.0%} {r.of_matmul:6.0%} {r.error:7.1e} {tiles}".rstrip()
        )
    return "\n".join(lines)


def notes(rows: list[Row], names: tuple[str, ...]) -> str:
    """Where a peer is faster than ours, how exact each peer is, and which were not timed and why."""
    compared = [r for r in rows if r.of_best is not None]
    behind = [r for r in compared if r.of_best > AS_FAST]
    lines = [f"slower than the best peer by more than {AS_FAST - 1:.0%}: {len(behind)} of {len(compared)} compared"]
    lines += [f"  {r.case.shape}, {r.case.bits} bits, M = {r.case.tokens}: {r.of_best:.2f}" for r in behind]
    for name in names:
        errors = [r.peers[name].error for r in rows if name in r.peers and r.peers[name].us is not None]
        lines.append(f"{name}: {len(errors)} timed" + (f", largest error {max(errors):.1e}" if errors else ""))
        failed: dict[str, list[Case]] = {}
        for r in rows:
            if name in r.peers and r.peers[name].reason:
                failed.setdefault(r.peers[name].reason, []).append(r.case)
        lines += [
            f"  not timed, {len(found)} cases from {found[0].shape}, M = {found[0].tokens}: {reason}"
            for reason, found in failed.items()
        ]
    return "\n".join(lines)


def peer_names(text: str) -> tuple[str, ...]:
    """`--peers`: "all", "none" or names with commas between them."""
    names = {"all": tuple(PEERS), "none": ()}.get(text, tuple(text.split(",")))
    if unknown := set(names) - set(PEERS):
        raise argparse.ArgumentTypeError(f"unknown peer {', '.join(sorted(unknown))}; there are {', '.join(PEERS)}")
    return names


def process_pool(jobs: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"))


def main() -> None:
    numbers = lambda text: tuple(int(m) for m in text.split(","))  # noqa: E731
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("kernels.json"))
    parser.add_argument("--only", choices=("linear", "experts"))
    parser.add_argument("--bits", type=numbers, default=(8, 4), help="of linear weights")
    parser.add_argument("--tokens", type=numbers)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--peers", type=peer_names)
    parser.add_argument("--jobs", type=int, default=8)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/kernels.py: needs a CUDA GPU")
    names = options.peers if options.peers is not None else (BF16,) if options.sweep else tuple(PEERS)
    found = kc.cases(options.only, options.tokens, options.sweep, options.bits)
    with process_pool(options.jobs) as pool:
        errors = list(pool.map(kc.check, found))
    wrong = [f"{case}: error {error}" for case, error in zip(found, errors, strict=True) if not error < MOST_ERROR]
    if wrong:
        sys.exit("\n".join(wrong))
    rows = [measure(case, error) for case, error in zip(found, errors, strict=True)]
    report = {"device": torch.cuda.get_device_name(), "copy_bytes_s": copy_rate(), "matmul_flop_s": matmul_rate()}

    def write() -> None:
        rows_ = [asdict(row) | {"of_best": row.of_best} for row in rows]
        options.out.write_text(json.dumps(report | {"rows": rows_}, indent=1))

    # Ours are safe on disk before foreign code runs.
    write()
    if "gemlite" in names:
        # A worker that another project's kernel kills takes the pool with it, and nothing else.
        with suppress(BrokenProcessPool), process_pool(options.jobs) as pool:
            plain = dict.fromkeys(replace(case, tiles=()) for case in found if case.shape != kc.LAYER)
            list(pool.map(compile_gemlite, plain))
    if names:
        rows = [with_peers(row, names) for row in rows]
        write()
    rows = fastest(rows) if options.sweep else rows
    rates = f"copy {copy_rate() / 1e12:.2f} TB/s, BF16 matmul {matmul_rate() / 1e12:.0f} TFLOP/s"
    print(f"{report['device']}: {rates}")
    print(table(rows, names))
    if names:
        print(notes(rows, names))


if __name__ == "__main__":
    main()
