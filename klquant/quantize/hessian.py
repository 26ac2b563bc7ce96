"""Second moments of a linear map's inputs: what GPTQ and AWQ minimize against.

For a weight W and inputs x the layer-wise loss is E‖(W − Ŵ)x‖² = tr((W − Ŵ) H (W − Ŵ)ᵀ) with H = E[x xᵀ].
Shape suffixes: T = tokens, K = in features; leading dimensions (experts) are batch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from klquant.quantize.factor import cholesky, solve

# An input whose share of the mean diagonal is below this was never seen.
UNSEEN = 1e-6


@dataclass
class Moments:
    """Sums over the tokens a linear map has seen, entry by entry of the batch; FP32 but for the weights' FP64.

    `hh` [..., K, K]: Σ a·x xᵀ; `weight` [...]: Σ a; `count` [...]: tokens. With the inputs x* of the undisturbed model,
    `drift` [..., K, K]: Σ a·(x* − x) xᵀ; with outputs r that the stream still lacks, `missing` [..., N, K]: Σ a·r xᵀ.
    """

    hh: Tensor
    weight: Tensor
    count: Tensor
    drift: Tensor | None = None
    missing: Tensor | None = None

    @classmethod
    def zeros(
        cls, k: int, *lead: int, device: torch.device | str = "cpu", drift: bool = False, n: int = 0
    ) -> "Moments":
        """Empty sums for inputs of size `k` and a batch `lead`; `n` > 0 also keeps missing outputs of that size."""
        return cls(
            hh=torch.zeros(*lead, k, k, device=device),
            weight=torch.zeros(lead, dtype=torch.float64, device=device),
            count=torch.zeros(lead, dtype=torch.int64, device=device),
            drift=torch.zeros(*lead, k, k, device=device) if drift else None,
            missing=torch.zeros(*lead, n, k, device=device) if n else None,
        )

    def add(
        self,
        x_TK: Tensor,
        *,
        reference_TK: Tensor | None = None,
        missing_TN: Tensor | None = None,
        weight_T: Tensor | None = None,
        at: int | tuple[()] = (),
    ) -> None:
        """Add tokens `x` [T, K], with weights `weight` [T] (default 1), to entry `at` (default: the only one)."""
        x = x_TK if _tensor_cores(x_TK) and weight_T is None else x_TK.float()
        weighted = x if weight_T is None else x * weight_T.float().unsqueeze(-1)
        _accumulate(self.hh[at], weighted, x)
        if self.drift is not None:
            _accumulate(self.drift[at], reference_TK.to(x.dtype) - x_TK.to(x.dtype), weighted)
        if self.missing is not None:
            _accumulate(self.missing[at], missing_TN.to(x.dtype), weighted)
        self.weight[at] += x.shape[0] if weight_T is None else weight_T.double().sum()
        self.count[at] += x.shape[0]

    def part(self, experts: slice) -> "Moments":
        """The sums of some experts."""
        drift, missing = (None if x is None else x[experts] for x in (self.drift, self.missing))
        return Moments(self.hh[experts], self.weight[experts], self.count[experts], drift, missing)

    def to(self, device: torch.device) -> "Moments":
        drift, missing = (None if x is None else x.to(device) for x in (self.drift, self.missing))
        return Moments(self.hh.to(device), self.weight.to(device), self.count.to(device), drift, missing)

    def empty(self, device: torch.device) -> "Moments":
        """Empty sums of the same shapes, on a device."""
        parts = (self.hh, self.weight, self.count, self.drift, self.missing)
        return Moments(*(None if x is None else torch.zeros_like(x, device=device) for x in parts))

    def merge(self, other: "Moments") -> None:
        """Add sums of the same shapes, from any device."""
        for name in ("hh", "weight", "count", "drift", "missing"):
            if (mine := getattr(self, name)) is not None:
                mine += getattr(other, name).to(mine.device)

    def mean(self) -> "Moments":
        """The same as means over the tokens; zero where no token was seen."""
        n = self.weight.clamp_min(1e-30).float()[..., None, None]
        return Moments(
            self.hh / n,
            self.weight,
            self.count,
            None if self.drift is None else self.drift / n,
            None if self.missing is None else self.missing / n,
        )

    def scaled(self, s: Tensor) -> "Moments":
        """The moments of x / s, for a scale [K] or [..., K]."""
        column, row = s.unsqueeze(-2), s.unsqueeze(-1)
        both = column * row
        return Moments(
            self.hh / both,
            self.weight,
            self.count,
            None if self.drift is None else self.drift / both,
            None if self.missing is None else self.missing / column,
        )


def _tensor_cores(x: Tensor) -> bool:
    """Whether products of these activations are summed in FP32 without widening them first."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)


def _accumulate(total_MK: Tensor, a_TM: Tensor, b_TK: Tensor) -> None:
    """total += aᵀ b in FP32."""
    if _tensor_cores(a_TM):
        total_MK += torch.mm(a_TM.T, b_TK, out_dtype=torch.float32)
    else:
        total_MK.addmm_(a_TM.T, b_TK)


def shrink_(mean_EKK: Tensor, count_E: Tensor, prior_KK: Tensor, tau: float) -> Tensor:
    """(n_e Ĥ_e + τ Ĥ_all) / (n_e + τ): an expert's own statistics, held up by the layer's where it saw few tokens.

    In place: a card has little room beside many Hessians. `count` is the number of tokens an expert saw; `prior` [K, K]
    or [E, K, K]. With n_e = 0 the result is the prior.
    """
    share = (count_E / (count_E + tau).clamp_min(1e-12)).to(mean_EKK.dtype)[..., None, None]
    return mean_EKK.mul_(share).add_(prior_KK * (1 - share))


def weigh_unseen(h_EKK: Tensor, share: float) -> Tensor:
    """H with share · mean(diag H) on the diagonal of inputs that calibration never saw; H itself when it saw them all.

    Without a weight of their own such inputs would be free to lose their values to whatever serves the others.
    """
    diagonal = h_EKK.diagonal(dim1=-2, dim2=-1)
    level = diagonal.mean(-1, keepdim=True)
    unseen = diagonal < UNSEEN * level
    if not bool(unseen.any()):
        return h_EKK
    return h_EKK + torch.diag_embed(unseen * (share * level))


def corrected_target(
    w_NK: Tensor, h_KK: Tensor, *, drift_KK: Tensor | None, missing_NK: Tensor | None, damp: float | Tensor
) -> Tensor:
    """The weight that undoes, as far as it is linear in x, what earlier layers' errors did.

    argmin_V E‖W x* + r − V x‖² + λ‖V − W‖² = W + (W E[(x* − x) xᵀ] + E[r xᵀ])(H + λI)⁻¹, λ = damp · mean(diag H): the
    inputs x should have been x*, and the residual stream still lacks r. `damp`: one number, or one for each expert.
    Related: GPTAQ, Li et al. 2025, arXiv 2504.02692, which corrects the inputs.
    """
    change = torch.zeros_like(w_NK)
    if drift_KK is not None:
        change += w_NK @ drift_KK
    if missing_NK is not None:
        change += missing_NK
    level = damp * h_KK.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-12)
    damped = h_KK.clone()
    damped.diagonal(dim1=-2, dim2=-1).add_(level[..., None])
    factor, info = cholesky(damped)
    if bool((info > 0).any()):
        raise torch.linalg.LinAlgError("inputs' second moments are not positive definite for all their ridge")
    return w_NK + solve(change, factor)
