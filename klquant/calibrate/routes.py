"""Tokens grouped by the expert they are routed to, and what experts make of their groups.

On a GPU all experts of a batch are one launch (`quantize.kernels.grouped`); elsewhere, and as the reference, one
expert follows the other.
Shape suffixes: T = tokens, R = routed rows (T · top-k, or a part of them), E = experts, C = hidden, I = expert width.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from klquant.checkpoint.config import KimiLinearConfig
from klquant.model.moe import activate, experts
from klquant.model.weights import MLPWeights, MoEWeights
from klquant.quantize import kernels
from klquant.quantize.hessian import Moments

# Tokens whose experts' outputs are held at once before they are added up: top-k times as many rows as tokens.
OUTPUT_TOKENS = 16384


@dataclass(frozen=True)
class Routes:
    """Routed rows of a batch in order of expert, then token: the token and router weight of each.

    The rows of the i-th expert are [bounds[i], bounds[i + 1]).
    """

    token: Tensor
    weight: Tensor
    bounds: list[int]

    @classmethod
    def sort(cls, weight_TK: Tensor, expert_TK: Tensor, experts: int) -> "Routes":
        """From the router's choice, experts of each token and their weights."""
        flat = expert_TK.flatten()
        order = flat.argsort(stable=True)
        counts = torch.bincount(flat, minlength=experts)
        bounds = [0, *counts.cumsum(0).tolist()]
        return cls(order // expert_TK.shape[1], weight_TK.flatten()[order], bounds)

    @classmethod
    def all_to_each(cls, tokens: int, experts: int, device: torch.device) -> "Routes":
        """Every token sent to every expert."""
        token = torch.arange(tokens, device=device).repeat(experts)
        return cls(token, torch.ones(len(token), device=device), [e * tokens for e in range(experts + 1)])

    def part(self, experts: slice) -> "Routes":
        """The rows of some experts."""
        bounds = self.bounds[experts.start : experts.stop + 1]
        rows = slice(bounds[0], bounds[-1])
        return Routes(self.token[rows], self.weight[rows], [b - bounds[0] for b in bounds])

    def to(self, device: torch.device) -> "Routes":
        return Routes(self.token.to(device), self.weight.to(device), self.bounds)

    def each(self) -> Iterator[tuple[int, slice]]:
        """Index and rows of every expert that has any."""
        for e, (first, last) in enumerate(zip(self.bounds, self.bounds[1:], strict=False)):
            if first < last:
                yield e, slice(first, last)


def hidden(w: MoEWeights, experts: slice, x_TC: Tensor, routes: Routes) -> Tensor:
    """What the experts' w2 reads, silu(w1 x) · (w3 x), for every routed row: [R, I]."""
    w1, w3 = w.w1[experts], w.w3[experts]
    if kernels.serve(x_TC):
        from klquant.quantize.kernels import grouped

        return grouped.linear(x_TC, routes.token, routes.bounds, w3, w1)
    out = x_TC.new_empty(routes.bounds[-1], w1.shape[1])
    for e, rows in routes.each():
        # An expert's w2 takes no part in this.
        out[rows] = activate(MLPWeights(w1[e], w3[e], w3[e]), x_TC[routes.token[rows]])
    return out


def add_moments(
    moments: Moments, x: Tensor, routes: Routes, reference: Tensor | None, *, gathered: bool, weighted: bool
) -> None:
    """Add each expert's rows to its entry of `moments`.

    x and reference hold tokens [T, K], or are `gathered`, a row for each route [R, K]. `weighted`: by the square of the
    router's weight, which scales the expert's output.
    """
    if kernels.serve(x) and not weighted:
        from klquant.quantize.kernels import grouped

        token = None if gathered else routes.token
        grouped.accumulate(moments.hh, x, token, routes.bounds)
        if moments.drift is not None:
            grouped.accumulate(moments.drift, x, token, routes.bounds, reference)
        seen = torch.tensor(routes.bounds, device=x.device).diff()
        moments.weight += seen
        moments.count += seen
        return
    for e, rows in routes.each():
        at = rows if gathered else routes.token[rows]
        moments.add(
            x[at], reference_TK=None if reference is None else reference[at],
            weight_T=routes.weight[rows].square() if weighted else None, at=e,
        )  # fmt: skip


def routed_output(cfg: KimiLinearConfig, w: MoEWeights, x_TC: Tensor, weight_TK: Tensor, expert_TK: Tensor) -> Tensor:
    """`klquant.model.moe.experts`: Σ over a token's routes of weight · expert(x), summed in FP32 in order of expert."""
    if not kernels.serve(x_TC):
        return experts(cfg, w, x_TC, weight_TK, expert_TK)
    parts = (x.split(OUTPUT_TOKENS) for x in (x_TC, weight_TK, expert_TK))
    return torch.cat([_grouped_output(w, *part) for part in zip(*parts, strict=True)])


def _grouped_output(w: MoEWeights, x_TC: Tensor, weight_TK: Tensor, expert_TK: Tensor) -> Tensor:
    from klquant.quantize.kernels import grouped

    routes = Routes.sort(weight_TK, expert_TK, w.w1.shape[0])
    y_RC = grouped.linear(hidden(w, slice(0, w.w1.shape[0]), x_TC, routes), None, routes.bounds, w.w2)
    out = torch.zeros_like(x_TC, dtype=weight_TK.dtype)
    # Where each token's rows lie, ascending and so in order of expert.
    for rows in routes.token.argsort(stable=True).view_as(expert_TK).unbind(-1):
        out += y_RC[rows] * routes.weight[rows, None]
    return out.to(x_TC.dtype)
