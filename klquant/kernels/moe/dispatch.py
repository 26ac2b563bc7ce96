"""Routed and shared experts as the engine sees them: Triton on a CUDA device, plain torch elsewhere."""

from dataclasses import dataclass

import torch
from torch import Tensor

from klquant.kernels.card import has_wgmma
from klquant.kernels.linear.dispatch import QuantMLP, Weight, apply_linear, pack_mlp, pad_inputs
from klquant.kernels.linear.layout import Packed
from klquant.kernels.moe import reference
from klquant.kernels.moe.offload import Offload
from klquant.kernels.moe.tiles import (
    JOINED_TOKENS,
    NORM_ROUTER_TOKENS,
    joined_tiles,
    many_tiles,
    shares_launch,
)
from klquant.kernels.norm import dispatch as norm
from klquant.kernels.norm.parts import Parts


@dataclass(frozen=True)
class QuantExperts:
    """E experts with packed weights, gate and up interleaved in one, and the shared expert, if any, beside them.

    With `offload` gate_up and down are of those experts that lie on the card, in no order.
    """

    gate_up: Packed
    down: Packed
    shared: QuantMLP | None
    offload: Offload | None = None

    @classmethod
    def of(cls, w1: Weight, w3: Weight, w2: Weight, shared: QuantMLP | None) -> "QuantExperts":
        """w1 (gate), w3 (up) [E, I, C] and w2 (down) [E, C, I]."""
        return cls(*pack_mlp(w1, w3, w2), shared)

    @property
    def count(self) -> int:
        """E."""
        return self.offload.experts if self.offload else self.gate_up.experts

    def __call__(self, x_TC: Tensor, weight_TR: Tensor, expert_TR: Tensor) -> Tensor:
        """Routed experts plus the shared one: x [T, C], weight [T, R] FP32, expert [T, R] int32 → [T, C]."""
        if not x_TC.is_cuda:
            assert self.offload is None, "no expert is offloaded from a CPU"
            routed = reference.experts(x_TC, weight_TR, expert_TR, self.gate_up, self.down)
            return routed if self.shared is None else routed + self.shared(x_TC)
        return apply_experts(self, x_TC, weight_TR, expert_TR)

    def parts(
        self, x_TC: Tensor, weight_TR: Tensor, expert_TR: Tensor, made: Tensor | None = None,
        slot_T: Tensor | None = None,
    ) -> Tensor | Parts:  # fmt: skip
        """The same, or what is still to be added up to be the same, which a norm can do on the way.

        `made`: T · (R + 1) zeros int32 that an earlier launch wrote, in which programs are counted. `slot_T` int32 (−1:
        padding): of a decode step, for which experts that lie in the host's memory come to the card.
        """
        if not x_TC.is_cuda:
            return self(x_TC, weight_TR, expert_TR)
        return expert_parts(self, x_TC, weight_TR, expert_TR, made, slot_T)


def apply_experts(w: QuantExperts, x_TC: Tensor, weight_TR: Tensor, expert_TR: Tensor) -> Tensor:
    """The kernels that the number of tokens asks for."""
    return added_up(expert_parts(w, x_TC, weight_TR, expert_TR), x_TC.dtype)


def added_up(y: Tensor | Parts, dtype: torch.dtype) -> Tensor:
    """[T, C] in `dtype`, which a tensor has already: one launch, or none."""
    if isinstance(y, Tensor):
        return y
    from klquant.kernels.moe.triton import combine

    return combine(y, dtype)


def expert_parts(
    w: QuantExperts, x_TC: Tensor, weight_TR: Tensor, expert_TR: Tensor, made: Tensor | None = None,
    slot_T: Tensor | None = None,
) -> Parts:  # fmt: skip
    """A row of each route, and the shared expert's beside them."""
    from klquant.kernels.moe.exchange import exchange
    from klquant.kernels.moe.triton import joined, many_tokens

    few, offload = len(x_TC) <= JOINED_TOKENS, w.offload
    if offload and few and slot_T is not None:
        exchange(offload, w.gate_up, w.down, expert_TR, slot_T)
    shared = None if w.shared is None else (w.shared.gate_up, w.shared.down)
    widest = max((w.gate_up, *(shared or ())[:1]), key=lambda p: p.k_padded)
    if few:
        tiles = joined_tiles(w.gate_up, w.down, len(x_TC))
        if w.shared is None or shares_launch(w.shared, tiles):
            x_TC = pad_inputs(x_TC, widest)
            return joined(x_TC, weight_TR, expert_TR, w.gate_up, w.down, shared, *tiles, made, offload)
    tiles = many_tiles(w.gate_up, w.down, expert_TR.numel() // w.count, has_wgmma(x_TC))
    apart = None
    if shared and not shares_launch(w.shared, tiles):
        shared, apart = None, apply_linear(apply_linear(x_TC, shared[0], gated=True), shared[1])
    x_TC = pad_inputs(x_TC, widest)
    if offload and not few:  # of few tokens the next layer's may change places before they are used
        offload = offload.staged()
    return many_tokens(x_TC, weight_TR, expert_TR, w.gate_up, w.down, shared, apart, *tiles, offload)


def route_tokens(
    x_TC: Tensor, router_EC: Tensor, bias_E: Tensor, top: int, scale: float, renormalize: bool
) -> tuple[Tensor, Tensor]:
    """Experts of each token, best first: (weight [T, R] FP32, expert [T, R] int32).

    x [T, C]; router [E, C] and bias [E] FP32, and FP32 all the way: the bias takes part in the choice and not in the
    weight; `renormalize`: the weights of a token add up to `scale`.
    """
    if not x_TC.is_cuda:
        return reference.route_tokens(x_TC, router_EC, bias_E, top, scale, renormalize)
    from klquant.kernels.moe import router

    return router.route_tokens(x_TC, router_EC, bias_E, top, scale, renormalize)


def add_rms_norm_route(
    h_TC: Tensor, delta_TC: Tensor | Parts | None, norm_C: Tensor, eps: float, router_EC: Tensor, bias_E: Tensor,
    top: int, scale: float, renormalize: bool, turn_T: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(h + delta, its norm, and weight and expert as `route_tokens` has them): one launch for few tokens.

    On a GPU, up to 64 tokens, the choice is made from the norm in FP32, before it is rounded to norm's dtype; programs
    are counted in `turn_T`, zeros int32 that an earlier launch wrote.
    """
    if h_TC.is_cuda and len(h_TC) <= NORM_ROUTER_TOKENS:
        from klquant.kernels.moe.router import add_rms_norm_route

        return add_rms_norm_route(h_TC, delta_TC, norm_C, eps, router_EC, bias_E, top, scale, renormalize, turn_T)
    total_TC, normed_TC = norm.add_rms_norm(h_TC, delta_TC, norm_C, eps)
    choice = router_EC, bias_E, top, scale, renormalize
    if not h_TC.is_cuda:
        return total_TC, normed_TC, *route_tokens(normed_TC, *choice)
    from klquant.kernels.moe.router import route_normed

    return total_TC, normed_TC, *route_normed(total_TC, normed_TC, norm_C, eps, *choice, turn_T)
