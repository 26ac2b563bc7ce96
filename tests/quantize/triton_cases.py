"""The kernels beside the plain functions they replace: at odd shapes in Triton's interpreter, larger on a GPU.

`test_triton.py` runs this file in a process that interprets. Everything allocated is poisoned first (NaN, largest int).
"""

import pytest

from tests.triton_interpreter import interpreting, needs_triton

if not interpreting:
    pytest.skip("run by test_triton.py", allow_module_level=True)

import torch

from klquant.core.grid import Quantized
from klquant.core.spec import WeightSpec
from klquant.quantize import gptq as reference
from klquant.quantize import rtn
from klquant.quantize.factor import _by_panels
from klquant.quantize.kernels import columns, scales
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


def start(w, h, spec):
    """Scales and the order of columns, as `gptq` makes them."""
    diagonal = h.diagonal(dim1=-2, dim2=-1)
    order = diagonal.argsort(dim=-1, descending=True, stable=True)
    return *rtn.fit_scales(w, spec, importance_K=diagonal), order


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
    scale, zero, order = start(w, h, spec)
    got, got_damp = columns.sweep(w, h, order, scale, zero, spec, 0.01)
    want, want_damp = reference.sweep(w, h, order, scale, zero, spec, 0.01)
    assert torch.equal(got, want) and torch.equal(got_damp, want_damp)


def test_sweep_with_one_hessian_for_several_experts(monkeypatch):
    monkeypatch.setattr(columns, "EXPERTS", 2)
    spec = WeightSpec(bits=4, group_size=32)
    w, h = problem(3, 4, 64)
    scale, zero, order = start(w, h[:1], spec)
    got, damp = columns.sweep(w, h[:1], order, scale, zero, spec, 0.01)
    assert damp.shape == (1,)
    assert torch.equal(got, reference.sweep(w, h[:1], order, scale, zero, spec, 0.01)[0])


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
    assert zero is None if spec.symmetric else torch.equal(zero, want_zero)


def test_a_group_beyond_the_registers_is_declined():
    w = torch.zeros(1, 1, 1, scales.LONGEST_GROUP + 1)
    assert scales.search(w, WeightSpec(bits=4, group_size=-1), None, [1.0]) is None


def test_whole_gptq_through_the_kernels(monkeypatch):
    """Dispatch itself: what a CUDA tensor would take."""
    spec = WeightSpec(bits=4, group_size=32)
    w, h = problem(1, 4, 64)
    want = reference.gptq(w, h, spec, rounds=1)
    monkeypatch.setattr("klquant.quantize.kernels.serve", lambda x: True)
    got = reference.gptq(w, h, spec, rounds=1)
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-3, atol=0)
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
