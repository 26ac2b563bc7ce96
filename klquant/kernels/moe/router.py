"""The router: logits in FP32, then one kernel for sigmoid, correction bias, the best R experts, renormalize, scale."""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

# More than so many tokens are a matrix product, which is cuBLAS's in FP32.
GEMV_TOKENS = 64


@triton.jit
def logits_kernel(
    x, x_stride, router, logits, tokens, experts, width,
    BE: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """logits [T, E] = x · routerᵀ in IEEE FP32; grid (tiles of BE experts, tiles of BT tokens).

    Products are added up where they are made, [BE, BT, BC], and meet once.
    """
    e = tl.program_id(0) * BE + tl.arange(0, BE)
    t = tl.program_id(1) * BT + tl.arange(0, BT)
    c = tl.arange(0, BC)
    acc = tl.zeros([BE, BT, BC], tl.float32)
    for i in tl.static_range(CHUNKS):
        at = i * BC + c
        inside = (at < width)[None, :]
        w = tl.load(router + e[:, None] * width + at[None, :], mask=inside & (e < experts)[:, None], other=0.0)
        y = tl.load(x + t[:, None] * x_stride + at[None, :], mask=inside & (t < tokens)[:, None], other=0.0)
        acc += w[:, None, :] * y.to(tl.float32)[None, :, :]
    to = logits + t[None, :] * experts + e[:, None]
    tl.store(to, tl.sum(acc, 2), mask=(e < experts)[:, None] & (t < tokens)[None, :])


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


def few_logits(x_TC: Tensor, router_EC: Tensor) -> Tensor:
    """x [T, C] · router [E, C] FP32 → [T, E] FP32: one launch that spreads over the whole card."""
    (tokens, width), experts = x_TC.shape, len(router_EC)
    logits = torch.empty(tokens, experts, device=x_TC.device, dtype=torch.float32)
    most = min(8, triton.next_power_of_2(tokens))
    rows = 2 if tokens <= 8 else 4
    columns = 1024 // most if most < 8 else 256
    logits_kernel[(triton.cdiv(experts, rows), triton.cdiv(tokens, most))](
        x_TC, x_TC.stride(0), router_EC, logits, tokens, experts, width,
        BE=rows, BT=most, BC=columns, CHUNKS=triton.cdiv(width, columns), num_warps=4,
    )  # fmt: skip
    return logits


def route_tokens(
    x_TC: Tensor, router_EC: Tensor, bias_E: Tensor, top: int, scale: float, renormalize: bool
) -> tuple[Tensor, Tensor]:
    """Two launches for few tokens."""
    if len(x_TC) <= GEMV_TOKENS:
        return route(few_logits(x_TC, router_EC), bias_E, top, scale, renormalize)
    return route(F.linear(x_TC.float(), router_EC), bias_E, top, scale, renormalize)
