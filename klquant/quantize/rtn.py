"""Round to nearest, with scales that minimize the squared error of the rounded weight.

Shape suffixes: N = out features, K = in features, G = groups; leading dimensions (experts) are batch.
"""

import torch
from torch import Tensor

from klquant.core.grid import SCALE_DTYPE, Quantized, encode
from klquant.core.spec import WeightSpec
from klquant.quantize import kernels

# Shrink factors tried on the range of a group. Clipping pays at few bits, where the step is coarse; at 8 bits the
# search only corrects the rounding of the scale itself.
SHRINK = {
    3: torch.linspace(1.10, 0.50, 41).tolist(),
    4: torch.linspace(1.06, 0.60, 33).tolist(),
    8: torch.linspace(1.00, 0.90, 11).tolist(),
}
# Elements of a temporary, so that the search stays small beside the weights it works on.
CHUNK = 1 << 25


def rtn(w_NK: Tensor, spec: WeightSpec, *, importance_K: Tensor | None = None) -> Quantized:
    """Quantize `w` [..., N, K] to the nearest codes on fitted scales (see `fit_scales`)."""
    scale, zero = fit_scales(w_NK, spec, importance_K=importance_K)
    return Quantized(spec, encode(w_NK, scale, zero, spec), scale, zero)


def fit_scales(w_NK: Tensor, spec: WeightSpec, *, importance_K: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Scales [..., N, G] (and int8 zero points, if asymmetric) that minimize Σ_k importance_k (w_k − ŵ_k)².

    The range of each group is shrunk at both ends by each factor of `SHRINK`; the scale is rounded to its stored dtype
    before the error is measured. `importance_K` [..., K] is usually the diagonal of the Hessian; None: all alike.
    """
    lead, (n, k) = w_NK.shape[:-2], w_NK.shape[-2:]
    groups, width = spec.groups(k), spec.width(k)
    rows = w_NK.reshape(-1, n, groups, width)
    weight = None if importance_K is None else importance_K.expand(*lead, k).reshape(-1, 1, groups, width).float()
    step = max(1, CHUNK // (n * k))
    parts = [
        _search(rows[i : i + step].float(), spec, None if weight is None else weight[i : i + step])
        for i in range(0, rows.shape[0], step)
    ]
    scale = torch.cat([p[0] for p in parts]).reshape(*lead, n, groups)
    if spec.symmetric:
        return scale, None
    return scale, torch.cat([p[1] for p in parts]).reshape(*lead, n, groups)


def _search(w: Tensor, spec: WeightSpec, weight: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """`w` [B, N, G, width] → best scale [B, N, G] and zero int8 [B, N, G] (None when symmetric)."""
    if kernels.serve(w):
        from klquant.quantize.kernels import scales

        if (found := scales.search(w, spec, weight, SHRINK[spec.bits])) is not None:
            return found
    low, high = w.amin(-1).clamp_max(0), w.amax(-1).clamp_min(0)
    if spec.symmetric:
        # The code range is one longer below zero: −low needs |qmin| steps, high needs qmax.
        full = torch.maximum(-low / -spec.qmin, high / spec.qmax)
    else:
        full = (high - low) / (spec.qmax - spec.qmin)
    full = torch.where(full > 0, full, 1.0)
    best = torch.full_like(full, torch.inf)
    best_scale = torch.ones_like(full, dtype=SCALE_DTYPE)
    best_zero = None if spec.symmetric else torch.zeros_like(full, dtype=torch.int8)
    buffer = torch.empty_like(w)
    for factor in SHRINK[spec.bits]:
        scale = (full * factor).to(SCALE_DTYPE)
        step = scale.float().unsqueeze(-1)
        torch.div(w, step, out=buffer)
        if spec.symmetric:
            buffer.round_().clamp_(spec.qmin, spec.qmax).mul_(step)
        else:
            zero = (spec.qmin - low * factor / scale.float()).round().clamp(spec.qmin, spec.qmax)
            shift = zero.unsqueeze(-1)
            buffer.round_().add_(shift).clamp_(spec.qmin, spec.qmax).sub_(shift).mul_(step)
            zero = zero.to(torch.int8)
        buffer.sub_(w).square_()
        error = (buffer if weight is None else buffer.mul_(weight)).sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        best_scale = torch.where(better, scale, best_scale)
        if best_zero is not None:
            best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero
