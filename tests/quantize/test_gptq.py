from itertools import pairwise

import pytest
import torch

from klquant.core.grid import SCALE_DTYPE, Quantized
from klquant.core.spec import WeightSpec
from klquant.quantize.factor import inverse_factor
from klquant.quantize.gptq import descend, gptq, layer_loss, refit_scales
from klquant.quantize.rtn import rtn
from tests.alone import Alone, in_threads

E, N, K = 3, 24, 160
DAMP = 0.01


def problem(seed=0, tokens=600, k=K):
    """Weights and Hessians of inputs with correlated, unequal channels, as real ones are."""
    gen = torch.Generator().manual_seed(seed)
    mix = torch.randn(E, k, k, generator=gen) / k**0.5 + torch.eye(k)
    x = torch.randn(E, tokens, k, generator=gen) @ mix * torch.logspace(-1, 1, k)
    return torch.randn(E, N, k, generator=gen) / k**0.5, x.mT @ x / tokens


def loss(w, h, result):
    return layer_loss(w - result.quantized.decode(), h)


SPECS = [
    WeightSpec(bits=bits, group_size=group, symmetric=symmetric)
    for bits in (3, 4, 8) for group, symmetric in ((32, True), (32, False), (-1, True))
]  # fmt: skip


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_each_stage_lowers_the_loss(spec):
    w, h = problem()
    losses = [layer_loss(w - rtn(w, spec).decode(), h)]
    losses += [loss(w, h, gptq(w, h, spec, damp=DAMP, rounds=rounds)) for rounds in (0, 1, 4)]
    for before, after in pairwise(losses):
        assert bool((after <= before * (1 + 1e-5)).all())
    assert float(losses[1].sum() / losses[0].sum()) < 0.7


def test_against_the_textbook_written_out():
    """The paper's algorithm on one expert, column by column with explicit inverses, in FP64."""
    w, h = problem(2, k=64)
    spec = WeightSpec(bits=4, group_size=32)
    ours = gptq(w[:1], h[:1], spec, rounds=0, damp=DAMP)
    scale = ours.quantized.scale[0].double()
    w1, h1 = w[0].double().clone(), h[0].double() + DAMP * h[0].diagonal().mean().double() * torch.eye(64)
    left = h[0].diagonal().argsort(descending=True, stable=True).tolist()
    codes = torch.zeros(N, 64)
    while left:
        j, rest = left[0], left[1:]
        inverse = torch.linalg.inv(h1[left][:, left])
        s = scale[:, j // 32]
        codes[:, j] = torch.round(w1[:, j] / s).clamp(spec.qmin, spec.qmax)
        error = (w1[:, j] - codes[:, j] * s) / inverse[0, 0]
        w1[:, rest] -= error[:, None] * inverse[0, 1:]
        left = rest
    different = (codes != ours.quantized.codes[0]).float().mean()
    assert different < 0.005  # a tie that FP32 breaks otherwise


def test_experts_do_not_see_each_other():
    w, h = problem(3)
    spec = WeightSpec(bits=4, group_size=32)
    together = gptq(w, h, spec, damp=DAMP, rounds=3)
    for e in range(E):
        alone = gptq(w[e : e + 1], h[e : e + 1], spec, damp=DAMP, rounds=3)
        assert (alone.quantized.codes[0] != together.quantized.codes[e]).float().mean() < 0.005
        torch.testing.assert_close(loss(w, h, alone)[e], loss(w, h, together)[e], rtol=1e-3, atol=0)


def test_a_shared_hessian_serves_stacked_weights():
    """w1 and w3 as one: rows do not interact."""
    w, h = problem(4)
    spec = WeightSpec(bits=4, group_size=32)
    both = gptq(torch.cat((w[:1], w[1:2]), dim=-2), h[:1], spec, damp=DAMP, rounds=3)
    for i in range(2):
        alone = gptq(w[i : i + 1], h[:1], spec, damp=DAMP, rounds=3)
        assert (both.quantized.codes[:, i * N : (i + 1) * N] != alone.quantized.codes).float().mean() < 0.005


def test_inverse_factor_is_one():
    _, h = problem(5)
    upper, used = inverse_factor(h.double(), 0.01)
    assert torch.equal(upper, upper.triu()) and used.tolist() == [0.01] * E
    level = 0.01 * h.double().diagonal(dim1=-2, dim2=-1).mean(-1)
    damped = h.double() + level[:, None, None] * torch.eye(K)
    torch.testing.assert_close(damped @ (upper.mT @ upper), torch.eye(K).double().expand(E, K, K), atol=1e-6, rtol=0)


def test_damping_grows_only_where_the_factorization_fails():
    w, h = problem(6)
    bad = h.clone()
    values, vectors = torch.linalg.eigh(bad[1].double())
    values[0] = -0.5 * values.mean()
    bad[1] = (vectors * values @ vectors.T).float()
    result = gptq(w, bad, WeightSpec(bits=4, group_size=32), damp=DAMP, rounds=0)
    assert result.damp[0] == result.damp[2] == pytest.approx(DAMP)
    assert result.damp[1] > DAMP and bool(torch.isfinite(result.quantized.decode()).all())


def test_no_curvature_at_all_is_an_error():
    w, h = problem(7)
    with pytest.raises(torch.linalg.LinAlgError, match="no positive curvature"):
        gptq(w, torch.zeros_like(h), WeightSpec(bits=4, group_size=32), damp=DAMP, rounds=0)


def test_what_no_damping_makes_positive_is_an_error():
    w, h = problem(7)
    h[1] = 1e9
    h[1].fill_diagonal_(1)
    with pytest.raises(torch.linalg.LinAlgError, match="stays indefinite however it is damped"):
        gptq(w, h, WeightSpec(bits=4, group_size=32), damp=DAMP, rounds=0)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_inputs_never_seen_do_no_harm(bits):
    """Channels that were always zero are rounded about as well as by RTN, and the others better."""
    w, h = problem(8)
    h[:, 10:20], h[:, :, 10:20] = 0, 0
    w[..., 12] *= 3  # an unseen input with the largest weights of its group
    spec = WeightSpec(bits=bits, group_size=32)
    ours, plain = (w - q.decode() for q in (gptq(w, h, spec, damp=DAMP, rounds=3).quantized, rtn(w, spec)))
    assert float(ours[..., 10:20].abs().max()) < 1.5 * float(plain[..., 10:20].abs().max())
    assert bool((layer_loss(ours, h) < layer_loss(plain, h)).all())


@pytest.mark.parametrize("step", [refit_scales, descend])
def test_refinements_never_raise_any_rows_loss(step):
    w, h = problem(9)
    for spec in (WeightSpec(bits=3, group_size=32), WeightSpec(bits=4, group_size=32, symmetric=False)):
        q = rtn(w, spec)
        before, after = (((d @ h) * d).sum(-1) for d in (w - q.decode(), w - step(w, h, q).decode()))
        assert bool((after <= before).all()) and float(after.sum() / before.sum()) < 0.99


def test_a_scale_moves_by_less_than_twice_or_half():
    """Though the loss of the rows whose weights are 3 and 0.3 times what their codes say would be lower."""
    spec, codes = (
        WeightSpec(bits=4, group_size=32),
        torch.arange(32, dtype=torch.int8).view(1, 1, 32).expand(1, 4, 32) % 15 - 7,
    )
    q = Quantized(spec, codes.contiguous(), torch.full((1, 4, 1), 0.5, dtype=SCALE_DTYPE), None)
    w = q.decode() * torch.tensor([3, 1.5, 0.75, 0.3])[:, None]
    found = refit_scales(w, torch.eye(32)[None], q).scale.flatten()
    torch.testing.assert_close(found.float(), torch.tensor([0.5, 0.75, 0.375, 0.5]), rtol=0.01, atol=0)


def test_an_exact_weight_stays_exact():
    spec = WeightSpec(bits=4, group_size=32)
    w, h = problem(10)
    grid = rtn(w, spec).decode()
    result = gptq(grid, h, spec, damp=DAMP, rounds=3)
    assert float((loss(grid, h, result) / layer_loss(grid, h)).max()) < 1e-4


def test_one_thread_at_a_time_solves_for_scales(monkeypatch):
    """Two cards at once would get each other's pivots: see `klquant.quantize.factor`."""
    w, h = problem(11)
    q = rtn(w, WeightSpec(bits=4, group_size=32))
    solved = torch.ones(E, N, 5, 1), torch.zeros(E, N, dtype=torch.int32)
    monkeypatch.setattr(torch.linalg, "solve_ex", alone := Alone(solved))
    in_threads(lambda: refit_scales(w, h, q))
    assert alone.most == 1
