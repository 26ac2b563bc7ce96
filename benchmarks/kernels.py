"""Time the kernels at the shapes of Kimi-Linear-48B, each only after its result was checked against FP64.

    PYTHONPATH=. python3 benchmarks/kernels.py [--only linear|experts] [--tokens 1,16] [--sweep] [--out kernels.json]

Times are of CUDA graph replays, divided by the calls in the graph; those walk over enough copies of the weight that
none is found in the L2 cache. GB/s counts the least an operation must move: packed weights it uses, inputs, outputs.
`--sweep` times every tile of a list and prints the fastest of each shape beside the table's: how the table is made.
Checks run in `--jobs` processes, which also fills Triton's cache.
"""

import argparse
import json
import multiprocessing
import sys
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch

from benchmarks import kernel_cases as kc
from benchmarks.kernel_cases import Case
from benchmarks.timing import copies_for, copy_rate, matmul_rate, time_us

# BF16 outputs, and of the experts BF16 activations in between.
MOST_ERROR = 5e-3


@dataclass(frozen=True)
class Row:
    case: Case
    error: float
    us: float
    matmul_us: float | None
    gb_s: float
    of_copy: float
    tflop_s: float
    of_matmul: float


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
        flops, plain = 2 * case.tokens * (kc.TOP + 1) * 3 * kc.HIDDEN * kc.INNER, None
    else:
        n, k, gated = kc.SHAPES[case.shape]
        w = kc.linear_weight(case.shape, case.bits)
        us = time_us([lambda w=w: kc.run_linear(case, x, w) for w in kc.copied(w, copies_for(w.nbytes))])
        nbytes = w.nbytes + 2 * case.tokens * (k + (n // 2 if gated else n))
        flops, plain = 2 * n * k * case.tokens, matmul_us(case.shape, case.tokens)
    rate, speed = nbytes / us * 1e6, flops / us * 1e6
    return Row(case, error, us, plain, rate / 1e9, rate / copy_rate(), speed / 1e12, speed / matmul_rate())


@cache
def matmul_us(shape: str, tokens: int) -> float:
    """torch.matmul with the same weight in BF16."""
    n, k, _ = kc.SHAPES[shape]
    x = torch.randn(tokens, k, device="cuda").bfloat16()
    weights = [torch.randn(n, k, device="cuda").bfloat16() for _ in range(copies_for(n * k * 2))]
    return time_us([lambda w=w: x @ w.T for w in weights])


def fastest(rows: list[Row]) -> list[Row]:
    """Of each shape the table's tile (listed first) and the fastest."""
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        found.setdefault((row.case.shape, row.case.bits, row.case.tokens), []).append(row)
    return [row for tried in found.values() for row in dict.fromkeys((tried[0], min(tried, key=lambda r: r.us)))]


def table(rows: list[Row]) -> str:
    ceilings = f"copy {copy_rate() / 1e12:.2f} TB/s, BF16 matmul {matmul_rate() / 1e12:.0f} TFLOP/s"
    lines = [
        f"{torch.cuda.get_device_name()}: {ceilings}",
        f"{'':15} {'b':>2} {'M':>5} {'µs':>8} {'BF16 µs':>8} {'GB/s':>5} {'copy':>5} {'matmul':>6} {'error':>7}",
    ]
    for r in rows:
        plain = "" if r.matmul_us is None else f"{r.matmul_us:.1f}"
        tiles = "  ".join("/".join(str(v) for v in asdict(tile).values()) for tile in r.case.tiles)
        lines.append(
            f"{r.case.shape[:15]:15} {r.case.bits:2} {r.case.tokens:5} {r.us:8.1f} {plain:>8} {r.gb_s:5.0f} "
            f"{r.of_copy:5.0%} {r.of_matmul:6.0%} {r.error:7.1e} {tiles}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("kernels.json"))
    parser.add_argument("--only", choices=("linear", "experts"))
    parser.add_argument("--tokens", type=lambda text: tuple(int(m) for m in text.split(",")))
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--jobs", type=int, default=8)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/kernels.py: needs a CUDA GPU")
    found = kc.cases(options.only, options.tokens, options.sweep)
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        errors = pool.map(kc.check, found, chunksize=1)
    wrong = [f"{case}: error {error}" for case, error in zip(found, errors, strict=True) if not error < MOST_ERROR]
    if wrong:
        sys.exit("\n".join(wrong))
    rows = [measure(case, error) for case, error in zip(found, errors, strict=True)]
    report = {
        "device": torch.cuda.get_device_name(),
        "copy_bytes_s": copy_rate(),
        "matmul_flop_s": matmul_rate(),
        "rows": [asdict(row) for row in rows],
    }
    options.out.write_text(json.dumps(report, indent=1))
    print(table(fastest(rows) if options.sweep else rows))


if __name__ == "__main__":
    main()
