"""AWQ's first half: find the scale of a seam's channels and fold it into a layer that is being quantized."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from klquant.calibrate.folding import Seam, consumer_scale, fold, fold_experts, producer_scale
from klquant.calibrate.paths import get, is_stack, tensor_names
from klquant.quantize.awq import Consumer, search_scale
from klquant.quantize.hessian import Moments, weigh_unseen

if TYPE_CHECKING:
    from klquant.calibrate.walk import LayerWalk


def rescale(
    walk: LayerWalk, seam: Seam, moments: Moments | None, experts: slice | None = None
) -> tuple[Moments | None, Tensor | None]:
    """Where AWQ quantizes a consumer of the seam, search the channel scale and fold it into the layer.

    Returns the moments of the scaled inputs x / s, and s itself: [K], or [E, K] for `experts`; None if there is none.
    The stacks of `experts` are changed in place.
    """
    decisions = {path: walk.decision(path) for path in seam.consumers}
    if all(d.algorithm != "awq" for d in decisions.values()):
        return moments, None
    rows = experts or slice(None)
    # Where nothing was seen any scale would do, even one that rounds the column to nought: it counts as the mean input.
    h = weigh_unseen(moments.hh, 1.0)
    consumers = []
    for path, decision in decisions.items():
        w = get(walk.exact, path)
        w = w[rows] if is_stack(path) else w[None]
        consumers.append(Consumer(w.float(), h, decision.spec))
    activity = h.diagonal(dim1=-2, dim2=-1).sqrt()
    if seam.kind == "tiled":
        activity = activity.view(-1, walk.config.kda_dim).square().mean(0).sqrt()
    scale = search_scale(consumers, activity, walk.recipe.awq.grid, partial(consumer_scale, walk.config, seam))
    _apply(walk, seam, scale, experts)
    inputs = consumer_scale(walk.config, seam, scale)
    return moments.scaled(inputs), inputs


def _apply(walk: LayerWalk, seam: Seam, scale: Tensor, experts: slice | None) -> None:
    """Fold into the weights and into grids already chosen; note the kept tensors that change by it."""
    if experts is None:
        walk.exact = fold(walk.config, walk.exact, seam, scale)
        walk.now = fold(walk.config, walk.now, seam, scale)
    else:
        for weights in (walk.exact, walk.now):
            fold_experts(walk.config, weights, seam, scale, experts)
    rows = experts or slice(None)
    for path in (seam.producer, *seam.consumers):
        if walk.decision(path).spec is None:
            w, names = get(walk.exact, path), tensor_names(walk.exact, path)
            kept = zip(names[rows], w[rows], strict=True) if is_stack(path) else [(names[0], w)]
            walk.result.changed |= {walk.prefix + name: value for name, value in kept}
    # A producer that is quantized already takes the powers of two into its scales, codes untouched.
    divisor = producer_scale(walk.config, seam, scale)
    for e, name in enumerate(tensor_names(walk.exact, seam.producer)[rows]):
        module = (walk.prefix + name).removesuffix(".weight")
        if (q := walk.result.quantized.get(module)) is not None:
            by = divisor[e] if is_stack(seam.producer) else divisor
            walk.result.quantized[module] = replace(q, scale=(q.scale.float() / by).to(q.scale.dtype))
