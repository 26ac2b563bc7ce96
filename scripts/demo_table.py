"""Print what `make demo` made: bytes of tensors and divergence from the BF16 model, one row a result of `klquant eval`.

python scripts/demo_table.py demo-out
"""

import sys
from pathlib import Path

from klquant.evaluate.result import check_comparable, load_result


def main(out: Path) -> None:
    results = [(path.stem, load_result(path)) for path in sorted(out.glob("*.json"))]
    check_comparable(results)
    _, first = results[0]
    whole = first.reference.checkpoint.size.tensors
    print(f"\n{'':<8}{'size':>10}{'of BF16':>10}{'KLD, nats a token':>20}{'top-1 same':>12}{'perplexity':>12}")
    print(f"{'bf16':<8}{whole / 1e6:>7.2f} MB{1:>10.0%}{0:>20.4f}{1:>12.1%}{first.overall.reference_perplexity:>12.2f}")
    for name, result in sorted(results, key=lambda r: -r[1].model.size.tensors):
        q, size = result.overall, result.model.size.tensors
        print(
            f"{name:<8}{size / 1e6:>7.2f} MB{size / whole:>10.0%}{q.kld.mean:>20.4f}{q.top1.mean:>12.1%}"
            f"{q.perplexity:>12.2f}"
        )


if __name__ == "__main__":
    main(Path(sys.argv[-1]))
