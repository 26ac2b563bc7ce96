"""The kernels beside the plain functions they replace: at odd shapes in Triton's interpreter, larger on a GPU.

`test_triton.py` runs this file in a process that interprets. Everything allocated is poisoned first (NaN, largest int).
"""

from types import SimpleNamespace

import pytest

from tests.triton_interpreter import interpreting, needs_triton

if not interpreting:
    pytest.skip("run by test_triton.py", allow_module_level=True)

import itertools

import torch

from klquant.calibrate import routes
from klquant.core.grid import Quantized
from klquant.core.spec import WeightSpec
from klquant.model.weights import MoEWeights
from klquant.quantize import gptq as reference
from klquant.quantize import rtn
from klquant.quantize.factor import _by_panels, _solve_by_panels
from klquant.quantize.hessian import Moments
from klquant.quantize.kernels import columns, grouped, scales
from tests.triton_interpreter import teach_bf16_products

pytestmark = needs_triton


@pytest.fixture(autouse=True, scope="module")
def _poisoned():
    teach_bf16_products()
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # makes torch.empty fill what it allocates
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


def problem(e, n, k, seed=0):
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(e, 2 * k, k, generator=gen) @ (torch.randn(k, k, generator=gen) / k**0.5 + torch.eye(k))
    x *= torch.logspace(-1, 1, k)
    return torch.randn(e, n, k, generator=gen) / k**0.5 + 0.02, x.mT @ x / (2 * k)


def both_sweeps(w, h, spec):
    """Codes and damping of the kernel and of the plain sweep, on the same scales."""
    scale, zero = rtn.fit_scales(w, spec, importance_K=h.diagonal(dim1=-2, dim2=-1))
    plain = reference.put_in_order(h, 0.01)
    factor, damp = columns.factors(h, plain.order, 0.01)
    got = columns.sweep(w, factor, plain.order, scale, zero, spec)
    return (got, damp), (reference.sweep(w, plain, scale, zero, spec), plain.damp)


# One tile and several, one block and a block and a bit, one expert and several.
CASES = {
    "g32": ((1, 33, 160), WeightSpec(bits=4, group_size=32)),
    "g32 asym": ((2, 3, 64), WeightSpec(bits=4, group_size=32, symmetric=False)),
    "row": ((1, 2, 132), WeightSpec(bits=3, group_size=-1)),
    "row 8 asym": ((1, 1, 50), WeightSpec(bits=8, group_size=-1, symmetric=False)),
}
cases = pytest.mark.parametrize(("shape", "spec"), CASES.values(), ids=CASES.keys())


@cases
def test_sweep(shape, spec):
    w, h = problem(*shape)
    (got, got_damp), (want, want_damp) = both_sweeps(w, h, spec)
    assert torch.equal(got, want) and torch.equal(got_damp, want_damp)


def test_sweep_with_one_hessian_for_several_experts(monkeypatch):
    monkeypatch.setattr(columns, "EXPERTS", 2)
    spec = WeightSpec(bits=4, group_size=32)
    w, h = problem(3, 4, 64)
    (got, damp), (want, _) = both_sweeps(w, h[:1], spec)
    assert damp.shape == (1,) and torch.equal(got, want)


@cases
def test_descend(shape, spec):
    w, h = problem(*shape, seed=1)
    q = rtn.rtn(w, spec)
    before = q.codes.clone()
    got, want = columns.descend(w, h, q), reference.descend(w, h, q)
    assert torch.equal(q.codes, before)
    assert torch.equal(got.codes, want.codes) and not torch.equal(got.codes, q.codes)


def test_descend_leaves_what_is_exact():
    spec = WeightSpec(bits=4, group_size=32)
    w, h = problem(1, 3, 64)
    q = rtn.rtn(w, spec)
    assert torch.equal(columns.descend(q.decode(), h, q).codes, q.codes)


@cases
def test_refit(shape, spec):
    w, h = problem(*shape, seed=2)
    q = rtn.rtn(w, spec)
    got, want = scales.refit_scales(w, h, q), reference.refit_scales(w, h, q)
    assert torch.equal(got.codes, q.codes)
    close = (got.scale.float() / want.scale.float() - 1).abs()
    assert float(close.max()) < 2**-6 and float((close > 0).float().mean()) < 0.02
    losses = [reference.layer_loss(w - x.decode(), h).sum() for x in (got, want, q)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-3, atol=0)
    assert losses[0] <= losses[2]


def test_normal_equations_are_those_of_fp64():
    e, n, k, groups = 2, 3, 64, 2
    w, h = problem(e, n, k)
    steps = torch.randint(-255, 256, (e, n, k), generator=torch.Generator().manual_seed(0)).bfloat16()
    a, b = scales.equations(steps, h, w, groups)
    c = steps.double().unflatten(-1, (groups, -1))
    parts = h.double().unflatten(-1, (groups, -1)).unflatten(-3, (groups, -1))
    exact = torch.einsum("engi,egihj,enhj->engh", c, parts, c)
    assert (a - exact).norm() / exact.norm() < 3e-5
    torch.testing.assert_close(b.double(), (c * w.double().unflatten(-1, (groups, -1))).sum(-1), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((2, 3, 2, 32), WeightSpec(bits=4, group_size=32)),
        ((1, 130, 1, 32), WeightSpec(bits=3, group_size=32, symmetric=False)),
        ((2, 3, 1, 300), WeightSpec(bits=4, group_size=-1)),
        ((1, 2, 1, 5000), WeightSpec(bits=8, group_size=-1, symmetric=False)),
    ],
    ids=str,
)
def test_search(shape, spec, weighted):
    b, _, groups, width = shape
    gen = torch.Generator().manual_seed(3)
    w = torch.randn(shape, generator=gen) * torch.rand(shape, generator=gen).pow(-0.3)
    w[0, 0] = 0  # a row of nothing
    weight = torch.rand(b, 1, groups, width, generator=gen) if weighted else None
    scale, zero = scales.search(w, spec, weight, rtn.SHRINK[spec.bits])
    want, want_zero = rtn._search(w, spec, weight)
    assert torch.equal(scale, want)
    assert (zero is None and want_zero is None) if spec.symmetric else torch.equal(zero, want_zero)


def test_a_group_beyond_the_registers_is_declined():
    w = torch.zeros(1, 1, 1, scales.LONGEST_GROUP + 1)
    assert scales.search(w, WeightSpec(bits=4, group_size=-1), None, [1.0]) is None


def test_whole_gptq_through_the_kernels(monkeypatch):
    """Dispatch itself: what a CUDA tensor would take."""
    spec = WeightSpec(bits=4, group_size=32)
    w, h = problem(1, 4, 64)
    want = reference.gptq(w, h, spec, damp=0.01, rounds=1)
    monkeypatch.setattr("klquant.quantize.kernels.serve", lambda x: True)
    got = reference.gptq(w, h, spec, damp=0.01, rounds=1)
    losses = [reference.layer_loss(w - x.quantized.decode(), h) for x in (got, want)]
    torch.testing.assert_close(*losses, rtol=1e-3, atol=0)
    assert isinstance(got.quantized, Quantized)
    assert (got.quantized.codes != want.quantized.codes).float().mean() < 0.01


def test_cholesky_by_panels_reports_as_the_library_does():
    _, h = problem(3, 1, 300)
    h[1, 200, 200] = -1.0
    factor, info = _by_panels(h)
    want, want_info = torch.linalg.cholesky_ex(h)
    assert torch.equal(info, want_info) and info.tolist() == [0, 201, 0]
    for e in (0, 2):
        torch.testing.assert_close(factor[e], want[e], rtol=1e-4, atol=1e-4)


def test_solving_by_panels_is_as_exact_as_the_library():
    a, h = problem(2, 5, 300)
    h += 0.01 * h.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] * torch.eye(300)
    exact = torch.linalg.solve(h.double(), a.double(), left=False)
    factor = torch.linalg.cholesky(h)
    library = torch.cholesky_solve(a.mT, factor).mT
    got, limit = ((x - exact).norm() for x in (_solve_by_panels(a, factor), library))
    assert got < 2 * limit


BOUNDS = [0, 0, 5, 5, 39, 40]  # an expert without rows first, one amid, one with more than a step of the kernel


def grouped_problem(k, seed=4):
    gen = torch.Generator().manual_seed(seed)
    x, star = (torch.randn(21, k, generator=gen).bfloat16() for _ in range(2))
    return x, star, torch.randint(0, 21, (BOUNDS[-1],), generator=gen)


def groups():
    return [(e, slice(first, last)) for e, (first, last) in enumerate(itertools.pairwise(BOUNDS))]


@pytest.mark.parametrize("k", [50, 130])
@pytest.mark.parametrize("drift", [False, True])
@pytest.mark.parametrize("gathered", [False, True])
def test_grams_of_groups(k, drift, gathered):
    x, star, rows = grouped_problem(k)
    before = torch.randn(len(BOUNDS) - 1, k, k, generator=torch.Generator().manual_seed(5))
    if not drift:
        before = before + before.mT
    got = before.clone()
    if gathered:
        x, star, rows = x[rows].contiguous(), star[rows].contiguous(), None
    grouped.accumulate(got, x, rows, BOUNDS, star if drift else None)
    for e, at in groups():
        b = x[at if gathered else rows[at]].float()
        a = (star[at if gathered else rows[at]].float() - b).bfloat16().float() if drift else b
        torch.testing.assert_close(got[e], before[e] + a.T @ b, rtol=1e-5, atol=1e-4)
    assert torch.equal(got[0], before[0])


def test_a_gram_does_not_depend_on_the_other_experts():
    x, star, rows = grouped_problem(50)
    whole = torch.zeros(5, 50, 50)
    grouped.accumulate(whole, x, rows, BOUNDS, star)
    part = torch.zeros(2, 50, 50)
    grouped.accumulate(part, x, rows[5:], [0, 34, 35], star)
    assert torch.equal(whole[3:], part)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize(("n", "k"), [(3, 50), (140, 70)])
def test_maps_of_groups(n, k, gated, gathered):
    x, _, rows = grouped_problem(k)
    gen = torch.Generator().manual_seed(6)
    up, gate = ((torch.randn(len(BOUNDS) - 1, n, k, generator=gen) / k**0.5).bfloat16() for _ in range(2))
    inputs = x[rows]
    if gathered:
        x, rows = inputs.contiguous(), None
    got = grouped.linear(x, rows, BOUNDS, up, gate if gated else None)
    for e, at in groups():
        want = inputs[at].float() @ up[e].float().T
        if gated:
            want = want.bfloat16() * torch.nn.functional.silu((inputs[at].float() @ gate[e].float().T).bfloat16())
        torch.testing.assert_close(got[at].float(), want.float(), rtol=2**-6, atol=1e-5)


def test_maps_of_no_rows():
    assert grouped.linear(torch.zeros(0, 8).bfloat16(), None, [0, 0], torch.zeros(1, 4, 8).bfloat16()).shape == (0, 4)


@pytest.mark.parametrize("drift", [False, True])
def test_routes_through_the_kernels(monkeypatch, drift):
    """Dispatch: what a CUDA tensor would take, beside expert after expert."""
    e, c, i, tokens = 5, 40, 24, 21
    gen = torch.Generator().manual_seed(7)

    def noise(*shape):
        return torch.randn(shape, generator=gen).bfloat16()

    config = SimpleNamespace(num_experts=e)
    stacks = (noise(e, i, c) / c**0.5, noise(e, i, c) / c**0.5, noise(e, c, i) / i**0.5)
    weights = MoEWeights(noise(e, c), noise(e), *stacks, None)
    expert = torch.stack([torch.randperm(e - 1, generator=gen)[:2] for _ in range(tokens)])  # none to the last
    weight = torch.rand(tokens, 2, generator=gen)
    x, star = noise(tokens, c), noise(tokens, c)
    part = routes.Routes.sort(weight, expert, e).part(slice(1, 5))

    def run():
        inputs, outputs = (Moments.zeros(k, 4, drift=drift) for k in (c, i))
        routes.add_moments(inputs, x, part, star if drift else None, gathered=False, weighted=False)
        h, h_star = (routes.hidden(weights, slice(1, 5), y, part) for y in (x, star))
        routes.add_moments(outputs, h, part, h_star if drift else None, gathered=True, weighted=False)
        return inputs, outputs, h, routes.routed_output(config, weights, x, weight, expert)

    inputs, outputs, h, y = run()
    monkeypatch.setattr("klquant.quantize.kernels.serve", lambda x: True)
    monkeypatch.setattr(routes, "OUTPUT_TOKENS", 16)
    got_inputs, got_outputs, got_h, got_y = run()
    for got, want in ((got_inputs, inputs), (got_outputs, outputs)):
        assert torch.equal(got.count, want.count) and torch.equal(got.weight, want.weight)
        torch.testing.assert_close(got.hh, want.hh, rtol=0.02, atol=0.02)
        if drift:
            torch.testing.assert_close(got.drift, want.drift, rtol=0.03, atol=0.05)
    torch.testing.assert_close(got_h, h, rtol=2**-6, atol=1e-3)
    torch.testing.assert_close(got_y, y, rtol=2**-6, atol=2e-2)
