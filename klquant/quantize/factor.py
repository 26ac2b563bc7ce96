"""Cholesky factors of Hessians in the order in which columns are rounded; many small systems of equations.

Shape suffixes: K = in features; E = experts (batch).
"""

from threading import Lock

import torch
from torch import Tensor

DAMP_GROWTH = 10.0
DAMP_LIMIT = 1e4
# Columns factored at once by `cholesky`, and solved for by `solve`, on a GPU.
PANEL = 128
# Torch's batched LU on a GPU (MAGMA's, above 16 unknowns) gives the host memory that tells where each matrix's pivots
# go back before the card has read it, and a thread at work on another card is handed it: pivots of one then land among
# the matrices of the other, without an error. LU ends in a wait for the card, so one at a time is enough.
_ONE_LU = Lock()


def permute_both(h_EKK: Tensor, order_EK: Tensor) -> Tensor:
    """Rows and columns of H in the order given, [E, K, K]."""
    rows = torch.take_along_dim(h_EKK, order_EK.unsqueeze(-1), dim=-2)
    return torch.take_along_dim(rows, order_EK.unsqueeze(-2), dim=-1)


def upper_factor(h_EKK: Tensor, damp: float) -> tuple[Tensor, Tensor]:
    """Upper R [E, K, K] with H + λI = R Rᵀ, λ = damp · mean(diag H), and the damping used [E].

    With J the exchange matrix and J (H + λI) J = M Mᵀ, M lower, R = J M J. `damp` grows tenfold for each expert whose
    factorization fails. Raises torch.linalg.LinAlgError when a Hessian holds no positive curvature at all.
    """
    diagonal = h_EKK.diagonal(dim1=-2, dim2=-1)
    level = diagonal.mean(-1)
    if not bool((level > 0).all() & torch.isfinite(level).all()):
        raise torch.linalg.LinAlgError("a Hessian has no positive curvature: no token reached this weight")
    used = torch.full_like(level, damp)
    while True:
        damped = h_EKK.flip(-1, -2)
        damped.diagonal(dim1=-2, dim2=-1).add_((used * level)[..., None])
        factor, info = cholesky(damped)
        failed = info > 0
        if not bool(failed.any()):
            return factor.flip(-1, -2), used
        used = torch.where(failed, used.clamp_min(1e-6) * DAMP_GROWTH, used)
        if float(used.max()) > DAMP_LIMIT:
            raise torch.linalg.LinAlgError("a Hessian stays indefinite however it is damped")


def inverse_factor(h_EKK: Tensor, damp: float) -> tuple[Tensor, Tensor]:
    """Upper U [E, K, K] with (H + λI)⁻¹ = UᵀU, and the damping used [E]: U = R⁻¹ of `upper_factor`.

    One factorization and one triangular inverse, without forming H⁻¹. Raises what `upper_factor` raises.
    """
    factor, used = upper_factor(h_EKK, damp)
    eye = torch.eye(h_EKK.shape[-1], device=h_EKK.device, dtype=h_EKK.dtype).expand_as(h_EKK)
    return torch.linalg.solve_triangular(factor, eye, upper=True), used


def cholesky(a_EKK: Tensor) -> tuple[Tensor, Tensor]:
    """Lower factor [E, K, K] and, for each matrix, 0 or the order of the leading minor that is not positive [E].

    The GPU libraries' batched factorizations are made for small matrices; large ones go panel by panel, nearly all of
    their arithmetic in batched products.
    """
    if a_EKK.is_cuda and a_EKK.shape[-1] > 2 * PANEL:
        return _by_panels(a_EKK)
    return torch.linalg.cholesky_ex(a_EKK)


def _by_panels(a_EKK: Tensor) -> tuple[Tensor, Tensor]:
    k = a_EKK.shape[-1]
    factor = torch.zeros_like(a_EKK)
    info = torch.zeros(a_EKK.shape[0], dtype=torch.int32, device=a_EKK.device)
    for start in range(0, k, PANEL):
        stop = min(start + PANEL, k)
        panel = a_EKK[:, start:, start:stop]
        if start:
            panel = torch.baddbmm(panel, factor[:, start:, :start], factor[:, start:stop, :start].mT, alpha=-1)
        corner, failed = torch.linalg.cholesky_ex(panel[:, : stop - start])
        info = torch.where((info == 0) & (failed > 0), failed + start, info)
        factor[:, start:stop, start:stop] = corner
        if stop < k:
            below = torch.linalg.solve_triangular(corner.mT, panel[:, stop - start :], upper=True, left=False)
            factor[:, stop:, start:stop] = below
    return factor, info


def solve(a_ENK: Tensor, factor_EKK: Tensor) -> Tensor:
    """A (L Lᵀ)⁻¹ [E, N, K] with L = `factor`, of `cholesky`; on a GPU panel by panel like that."""
    if a_ENK.is_cuda and a_ENK.shape[-1] > 2 * PANEL:
        return _solve_by_panels(a_ENK, factor_EKK)
    return torch.cholesky_solve(a_ENK.mT, factor_EKK).mT


def _solve_by_panels(a_ENK: Tensor, factor_EKK: Tensor) -> Tensor:
    x, k = a_ENK.clone(), a_ENK.shape[-1]
    panels = [slice(start, min(start + PANEL, k)) for start in range(0, k, PANEL)]
    corners = []
    for p in panels:  # Y Lᵀ = A
        corner = factor_EKK[..., p, p]
        eye = torch.eye(corner.shape[-1], dtype=x.dtype, device=x.device).expand_as(corner)
        corners.append(torch.linalg.solve_triangular(corner, eye, upper=False))
        left = x[..., p] - x[..., : p.start] @ factor_EKK[..., p, : p.start].mT if p.start else x[..., p]
        x[..., p] = left @ corners[-1].mT
    for p, inverse in zip(reversed(panels), reversed(corners), strict=True):  # X L = Y
        left = x[..., p] - x[..., p.stop :] @ factor_EKK[..., p.stop :, p] if p.stop < k else x[..., p]
        x[..., p] = left @ inverse
    return x


def solve_systems(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """x [.., G, 1] with a x = b for a [.., G, G] and b [.., G, 1], and for each system 0 where there is one [..].

    For threads: see `_ONE_LU`.
    """
    with _ONE_LU:
        return torch.linalg.solve_ex(a, b)
