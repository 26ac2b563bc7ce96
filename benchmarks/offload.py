"""What experts in the host's memory cost a layer of Kimi-Linear-48B, on a GPU.

    PYTHONPATH=. python3 -m benchmarks.offload [--bits 4] [--near 128,222]

First experts that change places with others in a decode step, by how many do: each moves its bytes both ways. Then a
layer's experts for many tokens of a prompt, with `--near` of 256 on the card: what is not there is read where it is.
Times are medians of CUDA graph replays.
"""

import click
import torch

from benchmarks import kernel_cases as kc
from benchmarks.timing import time_us
from klquant.core.memory import locked_pages
from klquant.kernels.linear.layout import Packed
from klquant.kernels.moe.dispatch import QuantExperts, apply_experts
from klquant.kernels.moe.exchange import exchange
from klquant.kernels.moe.offload import Offload

PAIRS = (0, 1, 2, 4, 8, 16)
TOKENS = (32, 128, 512, 4096)


def on_host(w: Packed) -> Packed:
    """A copy in locked memory."""

    def copied(t: torch.Tensor) -> torch.Tensor:
        return locked_pages(t.nbytes).view(t.dtype).view(t.shape).copy_(t)

    return w.map(copied)


def offloaded(w: QuantExperts, near: int) -> QuantExperts:
    far = tuple(on_host(half[near:]) for half in (w.gate_up, w.down))
    return QuantExperts(w.gate_up[:near], w.down[:near], w.shared, Offload.of(near, far, "cuda"))


def exchange_us(w: QuantExperts, pairs: int) -> float:
    """A step that chooses `pairs` experts that are all in the host's memory: in turn, with half of them on the card."""
    steps = torch.arange(w.count * pairs, device="cuda").view(-1, 1, pairs) if pairs else torch.zeros(64, 1, 1)
    steps = steps.to("cuda", torch.int32) % w.count
    before = w.offload.totals.tolist()
    slot = torch.zeros(1, dtype=torch.int32, device="cuda")
    us = time_us([lambda step=step: exchange(w.offload, w.gate_up, w.down, step, slot) for step in steps])
    _, chosen, missing = (b - a for a, b in zip(before, w.offload.totals.tolist(), strict=True))
    assert chosen - missing < w.count if pairs else missing < 2, f"of {chosen} experts {missing} were missing"
    return us


@click.command(help=__doc__)
@click.option("--bits", default=4, show_default=True)
@click.option("--near", default="222,136,92", show_default=True)
def main(bits: int, near: str) -> None:
    torch.set_grad_enabled(False)
    whole = kc.expert_weights(bits)
    each = sum(half[0].nbytes for half in (whole.gate_up, whole.down))
    print(f"{torch.cuda.get_device_name()}, INT{bits}, an expert is {each / 1e6:.2f} MB")
    half = offloaded(whole, whole.count // 2)
    print(f"{'change places':>13} {'µs':>8} {'GB/s each way':>14}")
    for pairs in PAIRS:
        us = exchange_us(half, pairs)
        print(f"{pairs:>13} {us:>8.1f} {f'{pairs * each / us / 1e3:.1f}' if pairs else '':>14}", flush=True)
    print(f"{'tokens':>13} {'near':>8} {'ms':>14} {'GB/s':>8}")
    for count in (whole.count, *map(int, near.split(","))):
        w = whole if count == whole.count else offloaded(whole, count)
        for tokens in TOKENS:
            x = torch.randn(tokens, kc.HIDDEN, device="cuda").bfloat16()
            route = kc.routing(tokens)
            us = time_us([lambda x=x, w=w, route=route: apply_experts(w, x, *route)])
            read = (whole.count - count) * each / us / 1e3
            print(f"{tokens:>13} {count:>8} {us / 1e3:>14.2f} {f'{read:.1f}' if read else '':>8}", flush=True)


if __name__ == "__main__":
    main()
