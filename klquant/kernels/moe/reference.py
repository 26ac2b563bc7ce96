"""The expert kernels' result in plain torch, in the dtype of the activations."""

import torch
import torch.nn.functional as F
from torch import Tensor

from klquant.kernels.linear import reference
from klquant.kernels.linear.layout import Packed


def experts(x_TC: Tensor, weight_TR: Tensor, expert_TR: Tensor, gate_up: Packed, down: Packed) -> Tensor:
    """Σ over a token's routes of weight · down(silu(gate(x)) · up(x)), [T, C], summed in the weights' dtype."""
    y_TC = torch.zeros_like(x_TC, dtype=weight_TR.dtype)
    for expert in expert_TR.unique().tolist():
        token, slot = torch.nonzero(expert_TR == expert, as_tuple=True)
        h = reference.gate_up(x_TC[token], gate_up[expert], down.k)
        y_TC.index_add_(0, token, reference.linear(h, down[expert]) * weight_TR[token, slot, None])
    return y_TC.to(x_TC.dtype)


def route(logits_TE: Tensor, bias_E: Tensor, top: int, scale: float, renormalize: bool) -> tuple[Tensor, Tensor]:
    """Logits [T, E] and bias [E] or [T, E] → (weight [T, R], expert [T, R] int32), best first.

    The bias takes part in the choice and not in the weight.
    """
    score_TE = logits_TE.sigmoid()
    expert_TR = (score_TE + bias_E).topk(top, -1).indices
    weight_TR = score_TE.gather(-1, expert_TR)
    if renormalize:
        weight_TR = weight_TR / (weight_TR.sum(-1, keepdim=True) + 1e-20)
    return weight_TR * scale, expert_TR.int()


def route_tokens(
    x_TC: Tensor, router_EC: Tensor, bias_E: Tensor, top: int, scale: float, renormalize: bool
) -> tuple[Tensor, Tensor]:
    """`route` on logits x · routerᵀ, in the router's dtype."""
    return route(F.linear(x_TC.to(router_EC.dtype), router_EC), bias_E, top, scale, renormalize)
