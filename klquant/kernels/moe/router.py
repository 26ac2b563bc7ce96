"""The router in one kernel: FP32 sigmoid, correction bias, the best R experts, renormalize, scale."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def router_kernel(
    logits, bias, weight, expert, experts, scale,
    TOP: tl.constexpr, RENORMALIZE: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One program a token. Among equals the lower index wins; a NaN score is as good as none."""
    token = tl.program_id(0)
    e = tl.arange(0, BLOCK_E)
    r = tl.arange(0, BLOCK_R)
    inside = e < experts
    score = tl.sigmoid(tl.load(logits + token * experts + e, mask=inside, other=0.0))
    choice = score + tl.load(bias + e, mask=inside, other=0.0)
    choice = tl.where(inside & (choice == choice), choice, float("-inf"))
    weights = tl.zeros([BLOCK_R], tl.float32)
    chosen = tl.zeros([BLOCK_R], tl.int32)
    for i in tl.static_range(TOP):
        best = tl.argmax(choice, 0)
        value = tl.sum(tl.where(e == best, score, 0.0), 0)
        weights = tl.where(r == i, value, weights)
        chosen = tl.where(r == i, best, chosen)
        choice = tl.where(e == best, float("-inf"), choice)
    if RENORMALIZE:
        weights = weights / (tl.sum(weights, 0) + 1e-20)
    at = token * TOP + r
    tl.store(weight + at, weights * scale, mask=r < TOP)
    tl.store(expert + at, chosen, mask=r < TOP)


def route(logits_TE: Tensor, bias_E: Tensor, top: int, scale: float, renormalize: bool) -> tuple[Tensor, Tensor]:
    """FP32 logits [T, E] and bias [E] → (weight [T, R] FP32, expert [T, R] int32), best first."""
    tokens, experts = logits_TE.shape
    weight = torch.empty(tokens, top, device=logits_TE.device, dtype=torch.float32)
    expert = torch.empty(tokens, top, device=logits_TE.device, dtype=torch.int32)
    router_kernel[(tokens,)](
        logits_TE, bias_E, weight, expert, experts, scale,
        TOP=top, RENORMALIZE=renormalize, BLOCK_E=triton.next_power_of_2(experts),
        BLOCK_R=triton.next_power_of_2(top), num_warps=1 if experts <= 256 else 4,
    )  # fmt: skip
    return weight, expert
