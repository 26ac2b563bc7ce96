"""Mixture of experts: sigmoid router with a correction bias, routed experts, a shared expert."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from klquant.checkpoint.config import KimiLinearConfig
from klquant.kernels.moe import reference
from klquant.model.weights import MLPOp, MLPWeights, MoEWeights, PackedMoE, linear


def route(cfg: KimiLinearConfig, w: MoEWeights | PackedMoE, x_TC: Tensor) -> tuple[Tensor, Tensor]:
    """Experts of each token, best first: (weight [T, R] FP32, expert [T, R] int64).

    The bias takes part in the choice and not in the weight. With several groups only the experts of the `topk_group`
    best ones, by the sum of their two best scores, can be chosen.
    """
    logits_TE, bias = F.linear(x_TC.float(), w.router), w.router_bias
    if cfg.num_groups > 1:
        grouped = (logits_TE.sigmoid() + bias).unflatten(-1, (cfg.num_groups, -1))
        best = grouped.topk(2, -1).values.sum(-1).topk(cfg.topk_group, -1).indices
        closed = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter(-1, best, False)
        bias = bias.masked_fill(closed.repeat_interleave(grouped.shape[-1], -1), float("-inf"))
    weight_TR, expert_TR = reference.route(logits_TE, bias, cfg.top_k, cfg.routed_scaling, cfg.renormalize)
    return weight_TR, expert_TR.long()


def assignments(expert_TR: Tensor, num_experts: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(expert, its tokens ascending, the slot of each in R) for every expert that got any, in order of expert."""
    order = expert_TR.flatten().argsort(stable=True)
    counts = torch.bincount(expert_TR.flatten(), minlength=num_experts).tolist()
    for expert, chosen in enumerate(order.split(counts)):
        if len(chosen):
            yield expert, chosen // expert_TR.shape[1], chosen % expert_TR.shape[1]


def experts(cfg: KimiLinearConfig, w: MoEWeights, x_TC: Tensor, weight_TR: Tensor, expert_TR: Tensor) -> Tensor:
    """Σ over a token's routes of weight · expert(x): [T, C], summed in FP32 in order of expert."""
    out_TC = torch.zeros_like(x_TC, dtype=weight_TR.dtype)
    for expert, token, slot in assignments(expert_TR, cfg.num_experts):
        y = mlp(MLPWeights(w.w1[expert], w.w3[expert], w.w2[expert]), x_TC[token])
        # A token meets an expert once, so no two rows collide and the sum is deterministic on a GPU as well.
        out_TC.index_add_(0, token, y * weight_TR[token, slot, None])
    return out_TC.to(x_TC.dtype)


def mlp(w: MLPWeights | MLPOp, x: Tensor) -> Tensor:
    """down(silu(gate(x)) · up(x))."""
    return linear(activate(w, x), w.down_proj) if isinstance(w, MLPWeights) else w(x)


def activate(w: MLPWeights, x: Tensor) -> Tensor:
    """silu(gate(x)) · up(x): what the down projection reads."""
    return F.silu(linear(x, w.gate_proj)) * linear(x, w.up_proj)


def moe(cfg: KimiLinearConfig, w: MoEWeights | PackedMoE, x_TC: Tensor) -> Tensor:
    """Routed experts plus the shared one."""
    weight_TR, expert_TR = route(cfg, w, x_TC)
    if isinstance(w, PackedMoE):
        return w.experts(x_TC, weight_TR, expert_TR.int())
    return experts(cfg, w, x_TC, weight_TR, expert_TR) + mlp(w.shared, x_TC)
