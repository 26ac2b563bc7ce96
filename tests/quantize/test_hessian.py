import pytest
import torch

from klquant.quantize.hessian import Moments, corrected_target, shrink_

K, N, T = 12, 7, 500


def tokens(seed=0, t=T):
    return torch.randn(t, K, generator=torch.Generator().manual_seed(seed)) * torch.linspace(0.5, 2, K)


def test_moments_are_means_of_outer_products_whatever_the_pieces():
    x, star, r, a = tokens(), tokens(1), torch.randn(T, N), torch.rand(T)
    m = Moments.zeros(K, 2, drift=True, n=N)
    for part in range(0, T, 130):
        piece = slice(part, part + 130)
        m.add(x[piece], reference_TK=star[piece], missing_TN=r[piece], weight_T=a[piece], at=1)
    mean = m.mean()
    total = a.sum()
    torch.testing.assert_close(mean.hh[1], (x * a[:, None]).T @ x / total, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mean.drift[1], ((star - x) * a[:, None]).T @ x / total, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mean.missing[1], (r * a[:, None]).T @ x / total, rtol=1e-4, atol=1e-5)
    assert mean.count.tolist() == [0, T] and not mean.hh[0].any()


def test_scaled_moments_are_those_of_scaled_inputs():
    x, star, r, s = tokens(), tokens(1), torch.randn(T, N), torch.linspace(0.5, 3, K)
    m, scaled = (Moments.zeros(K, drift=True, n=N) for _ in range(2))
    m.add(x, reference_TK=star, missing_TN=r)
    scaled.add(x / s, reference_TK=star / s, missing_TN=r)
    for name in ("hh", "drift", "missing"):
        torch.testing.assert_close(getattr(m.scaled(s), name), getattr(scaled, name), rtol=1e-4, atol=1e-4)


def test_shrinkage_runs_from_the_prior_to_the_experts_own():
    own, prior = torch.ones(3, K, K), torch.zeros(K, K)
    got = shrink_(own.clone(), torch.tensor([0, 100, 10**9]), prior, tau=100)
    assert got[0].max() == 0 and got[1].mean() == 0.5 and got[2].min() > 0.999
    assert torch.equal(shrink_(own.clone(), torch.tensor([0, 5, 9]), prior, tau=0)[1:], own[1:])


def test_the_corrected_target_is_the_regression_of_what_was_wanted():
    """V minimizes ‖W x* + r − V x‖²: its residual is uncorrelated with x, and no worse than W's on these tokens."""
    x, w = tokens().double(), torch.randn(N, K).double()
    star = x + 0.3 * x.roll(1, -1) + 0.05 * tokens(2).double()
    r = x @ torch.randn(K, N).double() * 0.1
    h, drift, missing = x.T @ x / T, (star - x).T @ x / T, r.T @ x / T
    v = corrected_target(w, h, drift_KK=drift, missing_NK=missing, damp=1e-9)
    want = star @ w.T + r
    assert float(((want - x @ v.T).T @ x / T).abs().max()) < 1e-6
    assert (want - x @ v.T).square().sum() < 0.1 * (want - x @ w.T).square().sum()


def test_a_heavy_ridge_keeps_the_weight():
    x, w = tokens(), torch.randn(N, K)
    h = x.T @ x / T
    v = corrected_target(w, h, drift_KK=h * 0.5, missing_NK=None, damp=1e6)
    torch.testing.assert_close(v, w, rtol=1e-4, atol=1e-4)


def test_second_moments_of_no_inputs_are_an_error():
    """No x has moments with a negative eigenvalue; a ridge below it cannot give a regression."""
    h = torch.eye(K) - 2 * torch.ones(K, K) / K
    with pytest.raises(torch.linalg.LinAlgError, match="second moments are not positive definite"):
        corrected_target(torch.randn(N, K), h, drift_KK=h, missing_NK=None, damp=0.01)
