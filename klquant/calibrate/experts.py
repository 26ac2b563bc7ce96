"""The routed experts of a layer: each is quantized on the tokens the router really sends to it.

An expert's moments are its own, shrunk toward a layer-wide prior, so that a rarely routed expert neither loses its
routing nor starves. For w1 and w3 the prior is the moments of all tokens; for w2, whose inputs are the expert's own
hidden units, it is a sample of the layer's tokens pushed through that expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from klquant.calibrate import folding
from klquant.calibrate.fit import with_prior
from klquant.calibrate.paths import get, put
from klquant.calibrate.rescale import rescale
from klquant.model.moe import activate, route
from klquant.model.weights import MLPWeights, MoEWeights
from klquant.quantize.hessian import Moments

if TYPE_CHECKING:
    from klquant.calibrate.walk import LayerWalk

PRIOR_TOKENS = 2048


@dataclass(frozen=True)
class Routing:
    """Where the router sends every calibration token: experts [T, R] and weights [T, R], in stream order."""

    expert: Tensor
    weight: Tensor

    def rows(self, start: int, stop: int, expert: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Among tokens [start, stop): positions (from start) of those sent to `expert`, and their weights."""
        hit = self.expert[start:stop] == expert
        where = hit.any(-1).nonzero().squeeze(-1)
        weight = (self.weight[start:stop] * hit).sum(-1)[where]
        return where.to(device), weight.to(device)


def quantize_experts(walk: LayerWalk, layer_wide: Moments | None) -> None:
    """Quantize every routed expert of the layer; `layer_wide` are the mean moments of the MLP's inputs."""
    total, tau = walk.config.num_experts, walk.recipe.gptq.shrink_tokens
    routing, sample = _route_all(walk)
    walk.result.expert_tokens = torch.bincount(routing.expert.flatten(), minlength=total).tolist()
    if all(walk.decision(path).spec is None for path in ("mlp.w1", "mlp.w3", "mlp.w2")):
        return
    for path in ("mlp.w1", "mlp.w3", "mlp.w2"):  # from here on `now` is filled expert by expert, in place
        walk.now = put(walk.now, path, get(walk.exact, path).clone())
    for first in range(0, total, walk.settings.expert_chunk):
        part = slice(first, min(first + walk.settings.expert_chunk, total))
        own = _input_moments(walk, routing, part)
        walk.fit(("mlp.w1", "mlp.w3"), with_prior(own, layer_wide, tau), part)
        own, prior = _hidden_moments(walk, routing, part, sample)
        moments, _ = rescale(walk, folding.EXPERT_OUTPUT, with_prior(own, prior.mean(), tau), part)
        walk.fit(("mlp.w2",), moments, part, walk.metrics[1])


def _route_all(walk: LayerWalk) -> tuple[Routing, tuple[Tensor, Tensor | None]]:
    """Route every token; also an even sample of the MLP's inputs [P, C], undisturbed ones beside it."""
    experts, weights, sample, sample_star = [], [], [], []
    windows, length, _ = walk.streams.quantized.shape
    stride = max(1, windows * length // PRIOR_TOKENS)
    for start, h, reference in walk.batches("routing"):
        x = walk.norm(h, walk.now.post_norm).flatten(0, 1)
        weight, expert = route(walk.config, walk.now.mlp, x)
        experts.append(expert.cpu())
        weights.append(weight.cpu())
        pick = slice(-(start * length) % stride, None, stride)
        sample.append(x[pick])
        if reference is not None:
            sample_star.append(walk.norm(reference, walk.exact.post_norm).flatten(0, 1)[pick])
    return Routing(torch.cat(experts), torch.cat(weights)), (
        torch.cat(sample), torch.cat(sample_star) if sample_star else None,
    )  # fmt: skip


def _routed(walk: LayerWalk, routing: Routing, part: slice, phase: str):
    """Yield (index in part, inputs [t, C], undisturbed inputs or None, token weights or None), batch by batch."""
    length = walk.streams.quantized.shape[1]
    gate = walk.recipe.gptq.weighting == "gate"
    for start, h, reference in walk.batches(phase):
        x = walk.norm(h, walk.now.post_norm).flatten(0, 1)
        x_star = None if reference is None else walk.norm(reference, walk.exact.post_norm).flatten(0, 1)
        first = start * length
        for e in range(part.start, part.stop):
            rows, weight = routing.rows(first, first + x.shape[0], e, x.device)
            if rows.numel():
                star = None if x_star is None else x_star[rows]
                # The router's weight scales the expert's output, so its square weighs the squared error.
                yield e - part.start, x[rows], star, weight.square() if gate else None


def _input_moments(walk: LayerWalk, routing: Routing, part: slice) -> Moments:
    moments = walk.moments(walk.config.hidden_size, part.stop - part.start)
    for e, x, star, weight in _routed(walk, routing, part, f"experts {part.start}–{part.stop - 1}: w1, w3"):
        moments.add(x, reference_TK=star, weight_T=weight, at=e)
    return moments


def _hidden_moments(
    walk: LayerWalk, routing: Routing, part: slice, sample: tuple[Tensor, Tensor | None]
) -> tuple[Moments, Moments]:
    """Moments of w2's inputs: of the routed tokens, and of the layer's sample."""
    now, exact, count = walk.now.mlp, walk.exact.mlp, part.stop - part.start
    own, prior = (walk.moments(walk.config.moe_intermediate_size, count) for _ in range(2))

    def add(moments: Moments, e: int, x: Tensor, star: Tensor | None, weight: Tensor | None) -> None:
        i = part.start + e
        hidden = _hidden(now, i, x)
        hidden_star = None if star is None else _hidden(exact, i, star)
        moments.add(hidden, reference_TK=hidden_star, weight_T=weight, at=e)

    for e in range(count):
        add(prior, e, *sample, None)
    for e, x, star, weight in _routed(walk, routing, part, f"experts {part.start}–{part.stop - 1}: w2"):
        add(own, e, x, star, weight)
    return own, prior


def _hidden(w: MoEWeights, expert: int, x_TC: Tensor) -> Tensor:
    return activate(MLPWeights(w.w1[expert], w.w3[expert], w.w2[expert]), x_TC)
