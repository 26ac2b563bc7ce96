"""AWQ: scale each input channel by how active it is, clip each group's range, then round to nearest.

Lin et al. 2023, arXiv 2306.00978. Both searches minimize the layer-wise loss tr((W − Ŵ) H (W − Ŵ)ᵀ) with the inputs'
second moments H = E[x xᵀ], so they need no activations.
Shape suffixes: N = out features, K = in features, G = groups, E = experts (batch).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from klquant.core.grid import SCALE_DTYPE, Quantized, encode
from klquant.core.spec import WeightSpec
from klquant.quantize.gptq import layer_loss
from klquant.quantize.hessian import weigh_unseen
from klquant.quantize.rtn import rtn

# The whole range first: of equal losses the first one wins.
CLIP = sorted(torch.linspace(1.05, 0.50, 23).tolist(), key=lambda factor: abs(factor - 1))


@dataclass(frozen=True)
class Consumer:
    """Weights [E, N, K] that read the scaled channels, their inputs' second moments [E, K, K] (or shared, [K, K]), the
    grid they get (None: kept, so that scaling costs them nothing)."""

    weight: Tensor
    h: Tensor
    spec: WeightSpec | None


def search_scale(
    consumers: list[Consumer], activity: Tensor, grid: int, spread: Callable[[Tensor], Tensor] = lambda s: s
) -> Tensor:
    """The channel scale with the lowest summed loss among s = activity^α, α = 0 … 1 in `grid` steps.

    `activity` [K] (one scale for all consumers) or [E, K] (one for each expert) is the root mean square of the inputs.
    W is quantized as W·diag(s) and read with inputs x / s. Scales are powers of two: folding them into BF16 tensors is
    then exact, which is worth more than a finer search. `spread` turns the free scales into those of the K inputs.
    """
    quantized = [c for c in consumers if c.spec is not None]
    peak = activity.amax(-1, keepdim=True).clamp_min(1e-30)
    base = activity.clamp_min(1e-4 * peak) / peak
    best = torch.full(activity.shape[:-1], torch.inf, device=activity.device)
    best_scale = torch.ones_like(base)
    for i in range(grid + 1):
        scale = torch.exp2((torch.log2(base) * (i / grid)).round())
        loss = sum(_loss(c, spread(scale)) for c in quantized)
        if activity.ndim == 1:
            loss = loss.sum() if loss.ndim else loss
        better = loss < best
        best = torch.where(better, loss, best)
        best_scale = torch.where(better.unsqueeze(-1), scale, best_scale)
    return best_scale


def _loss(consumer: Consumer, scale_K: Tensor) -> Tensor:
    """Loss [E] when the weight is quantized at this scale, ranges already shrunk where the inputs' power says so.

    Without that shrinking the search would credit the scales with what clipping alone does.
    """
    scale = scale_K.unsqueeze(-2)
    scaled = consumer.weight * scale
    power = consumer.h.diagonal(dim1=-2, dim2=-1) / scale_K.square()
    return layer_loss((scaled - rtn(scaled, consumer.spec, importance_K=power).decode()) / scale, consumer.h)


def _full_scale(rows: Tensor, spec: WeightSpec, shrink: float = 1.0) -> tuple[Tensor, Tensor | None]:
    """Scale, and zero point if asymmetric, of groups [..., G, width] whose range is shrunk by `shrink`."""
    low, high = rows.amin(-1).clamp_max(0) * shrink, rows.amax(-1).clamp_min(0) * shrink
    if spec.symmetric:
        scale = torch.maximum(low / spec.qmin, high / spec.qmax)
    else:
        scale = (high - low) / (spec.qmax - spec.qmin)
    scale = torch.where(scale > 0, scale, 1.0).to(SCALE_DTYPE)
    if spec.symmetric:
        return scale, None
    return scale, (spec.qmin - low / scale.float()).round().clamp(spec.qmin, spec.qmax).to(torch.int8)


def clipped(w_ENK: Tensor, h_EKK: Tensor, spec: WeightSpec) -> Quantized:
    """Round to nearest with each group's range clipped where that lowers (w_g − ŵ_g) H_gg (w_g − ŵ_g)ᵀ.

    Groups are searched one by one against their own block of H, [E, width, width]; an input that was never seen counts
    as much as the mean one.
    """
    h_EKK = weigh_unseen(h_EKK, 1.0)
    k = w_ENK.shape[-1]
    groups, width = spec.groups(k), spec.width(k)
    one = spec.model_copy(update={"group_size": -1})
    codes, scales, zeros = torch.empty(w_ENK.shape, dtype=torch.int8, device=w_ENK.device), [], []
    for g in range(groups):
        part = slice(g * width, (g + 1) * width)
        w, h = w_ENK[..., part], h_EKK[..., part, part]
        best = torch.full(w.shape[:-1], torch.inf, device=w.device)
        chosen: Quantized | None = None
        for shrink in CLIP:
            scale, zero = _full_scale(w.unsqueeze(-2), spec, shrink)
            trial = Quantized(one, encode(w, scale, zero, one), scale, zero)
            d = w - trial.decode()
            loss = ((d @ h) * d).sum(-1)
            if chosen is None:
                chosen, best = trial, loss
                continue
            better = (loss < best).unsqueeze(-1)
            best = torch.minimum(best, loss)
            chosen = Quantized(
                one,
                torch.where(better, trial.codes, chosen.codes),
                torch.where(better, trial.scale, chosen.scale),
                None if zero is None else torch.where(better, trial.zero, chosen.zero),
            )
        codes[..., part] = chosen.codes
        scales.append(chosen.scale)
        zeros.append(chosen.zero)
    return Quantized(spec, codes, torch.cat(scales, -1), None if spec.symmetric else torch.cat(zeros, -1))
