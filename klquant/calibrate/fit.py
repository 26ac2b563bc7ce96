"""From a weight, its decision and its inputs' moments to codes: the one place that chooses between the algorithms."""

from dataclasses import dataclass

import torch
from torch import Tensor

from klquant.core.grid import Quantized
from klquant.errors import UserError
from klquant.quantize.awq import clipped
from klquant.quantize.coupled import coupled_gptq
from klquant.quantize.gptq import gptq, layer_loss
from klquant.quantize.hessian import Moments, corrected_target, shrink_
from klquant.quantize.rtn import rtn
from klquant.recipe.decision import Decision
from klquant.recipe.schema import CALIBRATED, Recipe

# Output features worked on at once.
ROWS = 16384


@dataclass(frozen=True)
class TensorRecord:
    """How one weight was quantized and what it cost, for the provenance file.

    `error` is E‖(W − Ŵ)x‖² / E‖W x‖² over the calibration inputs where there are any (`measured` "outputs"), else
    ‖W − Ŵ‖² / ‖W‖² ("weights").
    """

    spec: str
    algorithm: str
    error: float
    measured: str
    tokens: int | None = None
    damp: float | None = None
    fallback: str | None = None


@dataclass(frozen=True)
class Fit:
    """Grids of a batch of weights [E, N, K] and one record each."""

    quantized: Quantized
    records: list[TensorRecord]


def with_prior(own: Moments, prior: Moments, tau: float) -> Moments:
    """Means of each expert's moments, shrunk toward the layer-wide means `prior`; the counts stay the expert's own."""
    mean = own.mean()
    return Moments(
        hh=shrink_(mean.hh, own.count, prior.hh, tau),
        weight=own.weight,
        count=own.count,
        drift=None if mean.drift is None else shrink_(mean.drift, own.count, prior.drift, tau),
    )


def fit_weight(
    w_ENK: Tensor, decision: Decision, moments: Moments | None, recipe: Recipe, sizes: list[int],
    metric_NN: Tensor | None = None,
) -> list[Fit]:  # fmt: skip
    """Quantize `w` [E, N, K] as `decision` says; `moments` are means (`Moments.mean`), batched over E or shared.

    GPTQ takes errors of different outputs in the metric `metric`, if there is one.

    Returns one Fit for each of the stacked parts of `sizes` output features. A weight whose inputs never varied (H = 0:
    nothing was seen at all) is quantized for the plain weight error, and its record says so. Without a metric
    rows do not interact, so a weight with very many (the head) is worked on in pieces. Raises UserError when the
    moments are not finite.
    """
    w, h, seen = w_ENK.float(), None, None
    if moments is not None:
        if not bool(torch.isfinite(moments.hh).all()):
            raise UserError(
                f"{decision.key.name}: its calibration inputs are not finite; a weight before it is damaged"
            )
        h = moments.hh.expand(w.shape[0], -1, -1)
        seen = h.diagonal(dim1=-2, dim2=-1).sum(-1) > 0
        # An unseen input has no Hessian; the identity makes every algorithm minimize the plain weight error.
        if not bool(seen.all()):
            h = torch.where(seen[:, None, None], h, torch.eye(h.shape[-1], device=h.device))
    size = ROWS if metric_NN is None else w.shape[1]
    pieces = [
        _run(w[:, start : start + size], h, decision, moments, recipe, slice(start, start + size), metric_NN)
        for start in range(0, w.shape[1], size)
    ]
    quantized, damp = Quantized.cat([q for q, _ in pieces], dim=-2), pieces[0][1]
    fits = []
    for part, grid in zip(w.split(sizes, -2), quantized.split(sizes, -2), strict=True):
        records = _records(decision, recipe, _error(part, grid, h), moments, seen, damp)
        fits.append(Fit(grid, records))
    return fits


def _run(
    w_ENK: Tensor, h_EKK: Tensor | None, decision: Decision, moments: Moments | None, recipe: Recipe, rows: slice,
    metric_NN: Tensor | None,
) -> tuple[Quantized, list[float] | None]:  # fmt: skip
    """One algorithm on one piece: its grid, and the damping of each expert where that has a meaning."""
    spec = decision.spec
    if h_EKK is None or decision.algorithm == "rtn":
        return rtn(w_ENK, spec), None
    if decision.algorithm == "awq":
        return (clipped(w_ENK, h_EKK, spec) if recipe.awq.clip else rtn(w_ENK, spec)), None
    p, target = recipe.gptq, w_ENK
    if p.correction and (moments.drift is not None or moments.missing is not None):
        missing = None if moments.missing is None else moments.missing[..., rows, :]
        damp = p.correction_ridge * w_ENK.shape[-1] / moments.count.clamp_min(1)
        full = corrected_target(w_ENK, h_EKK, drift_KK=moments.drift, missing_NK=missing, damp=damp)
        target = torch.lerp(w_ENK, full, p.correction)
    if metric_NN is None:
        result = gptq(target, h_EKK, spec, damp=p.damp, rounds=p.refine_rounds)
    else:
        result = coupled_gptq(target, h_EKK, metric_NN, spec, damp=p.damp, rounds=p.refine_rounds)
    return result.quantized, result.damp.tolist()


def _error(w_ENK: Tensor, grid: Quantized, h_EKK: Tensor | None) -> list[float]:
    """Relative to what there was; 0 where there was nothing, such as of a matrix of zeros."""
    loss = (lambda x: x.square().sum((-1, -2))) if h_EKK is None else (lambda x: layer_loss(x, h_EKK))
    lost, whole = loss(w_ENK - grid.decode()), loss(w_ENK)
    return torch.where(whole == 0, 0.0, lost / whole).tolist()


def _records(
    decision: Decision, recipe: Recipe, errors: list[float], moments: Moments | None, seen: Tensor | None,
    damp: list[float] | None,
) -> list[TensorRecord]:  # fmt: skip
    spec, algorithm = str(decision.spec), decision.algorithm
    if moments is None:
        return [TensorRecord(spec, algorithm, e, "weights") for e in errors]
    counts = moments.count.expand(len(errors)).tolist()
    records = []
    for i, (error, ok, tokens) in enumerate(zip(errors, seen.tolist(), counts, strict=True)):
        used, fallback = None if damp is None else damp[i], None
        calibrated = algorithm in CALIBRATED
        if calibrated and not ok:
            fallback = "no token reached it: plain weight error minimized"
        elif calibrated and tokens == 0:
            fallback = "no token reached it: the layer's statistics alone were used"
        elif used is not None and used > recipe.gptq.damp * 1.5:
            fallback = f"Hessian not positive definite: damping raised to {used:g}"
        measured = "outputs" if ok else "weights"
        records.append(TensorRecord(spec, algorithm, error, measured, tokens, used, fallback))
    return records
