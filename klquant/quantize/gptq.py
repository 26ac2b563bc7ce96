"""GPTQ: round a weight column by column, pushing each column's error onto the columns not yet rounded.

Frantar et al. 2023, arXiv 2210.17323; columns are taken in falling order of the Hessian's diagonal, with every group's
scale fixed beforehand, so the output needs no `g_idx`. Two refinements follow and never raise the loss: scales refit by
least squares given the codes, and coordinate descent on the codes given the scales.
Shape suffixes: N = out features, K = in features, G = groups, E = experts (batch).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from klquant.core.grid import SCALE_DTYPE, Quantized
from klquant.core.spec import WeightSpec
from klquant.quantize import kernels
from klquant.quantize.factor import inverse_factor, permute_both, solve_systems
from klquant.quantize.hessian import weigh_unseen
from klquant.quantize.rtn import fit_scales

BLOCK = 128


@dataclass(frozen=True)
class GPTQResult:
    """The rounded weight and the damping used [E]."""

    quantized: Quantized
    damp: Tensor


@dataclass(frozen=True)
class Ordered:
    """How columns are rounded against Hessians: their order [E, K], falling by the diagonal; the factor [E, K, K] that
    `sweep` needs, of the damped Hessian so ordered; and the damping used [E]. E = 1: shared."""

    order: Tensor
    factor: Tensor
    damp: Tensor


def put_in_order(h_EKK: Tensor, damp: float) -> Ordered:
    """Raises torch.linalg.LinAlgError when a Hessian holds no positive curvature at all."""
    order = h_EKK.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True, stable=True)
    if kernels.serve(h_EKK):
        from klquant.quantize.kernels import columns

        return Ordered(order, *columns.factors(h_EKK, order, damp))
    return Ordered(order, *inverse_factor(permute_both(h_EKK, order), damp))


def gptq(
    w_ENK: Tensor, h_EKK: Tensor, spec: WeightSpec, *, damp: float, rounds: int, ordered: Ordered | None = None
) -> GPTQResult:
    """Quantize `w` [E, N, K] against Hessians `h` [E, K, K] (or [1, K, K], shared).

    `damp` is the share of the mean diagonal added to it; it grows tenfold for each expert whose factorization fails and
    what was used is returned. `rounds` of scale refit and coordinate descent follow (0: textbook GPTQ). `ordered`:
    `put_in_order(h, damp)`, from a caller that has it. Raises what `put_in_order` raises.
    """
    w = w_ENK.float()
    h = h_EKK.float()
    diagonal = h.diagonal(dim1=-2, dim2=-1)
    # Damped like the Hessian: an input that calibration never saw must not lose its range.
    scale, zero = fit_scales(w, spec, importance_K=diagonal + damp * diagonal.mean(-1, keepdim=True))
    ordered = ordered or put_in_order(h, damp)
    best = Quantized(spec, sweep(w, ordered, scale, zero, spec), scale, zero)
    h = weigh_unseen(h, damp)
    for _ in range(rounds):
        best = descend(w, h, refit_scales(w, h, best))
    return GPTQResult(best, ordered.damp.expand(w.shape[0]))


def layer_loss(d_ENK: Tensor, h_EKK: Tensor) -> Tensor:
    """tr(D H Dᵀ) of each expert, [E]: E‖D x‖² summed over the outputs."""
    return ((d_ENK @ h_EKK) * d_ENK).sum((-1, -2))


def sweep(w_ENK: Tensor, ordered: Ordered, scale_ENG: Tensor, zero_ENG: Tensor | None, spec: WeightSpec) -> Tensor:
    """GPTQ's codes int8 [E, N, K] on the scales given."""
    if kernels.serve(w_ENK):
        from klquant.quantize.kernels import columns

        return columns.sweep(w_ENK, ordered.factor, ordered.order, scale_ENG, zero_ENG, spec)
    e = w_ENK.shape[0]
    upper, order = ordered.factor.expand(e, -1, -1), ordered.order.expand(e, -1)
    return _round_columns(w_ENK, upper, order, scale_ENG, zero_ENG, spec)


def _round_columns(
    w_ENK: Tensor, upper_EKK: Tensor, order_EK: Tensor, scale_ENG: Tensor, zero_ENG: Tensor | None, spec: WeightSpec
) -> Tensor:
    """The GPTQ sweep in the order given; returns int8 codes [E, N, K] in the original order."""
    k = w_ENK.shape[-1]
    # Inputs first: a column of the weight is then contiguous, which is what every step of the sweep touches.
    w = torch.take_along_dim(w_ENK.mT, order_EK.unsqueeze(-1), dim=-2).contiguous()
    group_EK = (order_EK // spec.width(k)).unsqueeze(-1)
    scale = torch.take_along_dim(scale_ENG.float().mT, group_EK, dim=-2)
    zero = None if zero_ENG is None else torch.take_along_dim(zero_ENG.float().mT, group_EK, dim=-2)
    codes = torch.empty(w.shape, dtype=torch.int8, device=w.device)
    for start in range(0, k, BLOCK):
        stop = min(start + BLOCK, k)
        block = w[:, start:stop]
        errors = torch.empty_like(block)
        u = upper_EKK[:, start:stop, start:stop]
        for j in range(stop - start):
            column, s = block[:, j], scale[:, start + j]
            z = 0.0 if zero is None else zero[:, start + j]
            code = (torch.round(column / s) + z).clamp_(spec.qmin, spec.qmax)
            codes[:, start + j] = code
            errors[:, j] = (column - (code - z) * s) / u[:, j, j, None]
            block[:, j + 1 :].baddbmm_(u[:, j, j + 1 :, None], errors[:, j : j + 1], alpha=-1)
        w[:, stop:].baddbmm_(upper_EKK[:, start:stop, stop:].mT, errors, alpha=-1)
    back = order_EK.argsort(dim=-1).unsqueeze(-1)
    return torch.take_along_dim(codes, back, dim=-2).mT.contiguous()


def refit_scales(w_ENK: Tensor, h_EKK: Tensor, q: Quantized) -> Quantized:
    """Scales that minimize the loss given the codes, one small least-squares system a row; kept only where they help.

    Row by row min_s (w − Σ_g s_g c_g) H (…)ᵀ has the normal equations A s = b, A_gg' = c_g H c_g'ᵀ, b_g = c_g H wᵀ.
    """
    if kernels.serve(w_ENK):
        from klquant.quantize.kernels import scales

        return scales.refit_scales(w_ENK, h_EKK, q)
    spec, k = q.spec, w_ENK.shape[-1]
    groups, width = spec.groups(k), spec.width(k)
    steps = q.codes.float() if q.zero is None else (q.codes.unflatten(-1, (groups, width)).float()
                                                    - q.zero.unsqueeze(-1)).flatten(-2)  # fmt: skip
    e, n = w_ENK.shape[0], w_ENK.shape[-2]
    b = ((w_ENK @ h_EKK) * steps).unflatten(-1, (groups, width)).sum(-1)
    a = torch.empty(e, n, groups, groups, device=w_ENK.device)
    for g in range(groups):
        part = slice(g * width, (g + 1) * width)
        pushed = steps[..., part] @ h_EKK[..., part, :]
        a[..., g, :] = (pushed * steps).unflatten(-1, (groups, width)).sum(-1)
    ridge = 1e-6 * a.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-20)
    a = a + torch.diag_embed(ridge[..., None].expand(e, n, groups))
    fitted, info = solve_systems(a, b.unsqueeze(-1))
    fitted = fitted.squeeze(-1)
    usable = (info == 0).unsqueeze(-1) & torch.isfinite(fitted) & (fitted > 0)
    # A scale far from the one the codes were made for belongs to a group with hardly any code; leave it alone.
    old = q.scale.float()
    usable &= (fitted < 2 * old) & (fitted > 0.5 * old)
    candidate = replace(q, scale=torch.where(usable, fitted, old).to(SCALE_DTYPE))
    return _better_rows(w_ENK, h_EKK, candidate, q)


def descend(w_ENK: Tensor, h_EKK: Tensor, q: Quantized) -> Quantized:
    """One round of coordinate descent on the codes: each column takes its best code given all the others.

    With the gradient R = (W − Ŵ) H, column j moves to the code nearest ŵ_j + R_j / H_jj; the loss never rises.
    """
    if kernels.serve(w_ENK):
        from klquant.quantize.kernels import columns

        return columns.descend(w_ENK, h_EKK, q)
    spec, k = q.spec, w_ENK.shape[-1]
    width = spec.width(k)
    w_hat = q.decode().mT.contiguous()
    scale, codes = q.scale.float().mT.contiguous(), torch.empty_like(w_hat, dtype=torch.int8)
    zero = None if q.zero is None else q.zero.float().mT.contiguous()
    diagonal = h_EKK.diagonal(dim1=-2, dim2=-1).clamp_min(1e-20)
    residual = w_ENK.mT - w_hat
    for start in range(0, k, BLOCK):
        stop = min(start + BLOCK, k)
        r = h_EKK[:, start:stop] @ residual
        h = h_EKK[:, start:stop, start:stop]
        for j in range(stop - start):
            col = start + j
            s = scale[:, col // width]
            z = 0.0 if zero is None else zero[:, col // width]
            want = w_hat[:, col] + r[:, j] / diagonal[:, col, None]
            code = (torch.round(want / s) + z).clamp_(spec.qmin, spec.qmax)
            delta = (code - z) * s - w_hat[:, col]
            codes[:, col] = code
            # Columns of this block already passed are not looked at again in this round.
            r[:, j + 1 :].baddbmm_(h[:, j + 1 :, j : j + 1], delta.unsqueeze(1), alpha=-1)
            residual[:, col] -= delta
    codes = codes.mT.contiguous()
    return _better_rows(w_ENK, h_EKK, replace(q, codes=codes), q)


def _better_rows(w_ENK: Tensor, h_EKK: Tensor, new: Quantized, old: Quantized) -> Quantized:
    """Row by row the one with the lower loss: guards against what rounding the scales may undo."""
    d_new, d_old = w_ENK - new.decode(), w_ENK - old.decode()
    better = ((d_new @ h_EKK) * d_new).sum(-1) < ((d_old @ h_EKK) * d_old).sum(-1)
    better = better.unsqueeze(-1)
    return replace(
        new, codes=torch.where(better, new.codes, old.codes), scale=torch.where(better, new.scale, old.scale)
    )
