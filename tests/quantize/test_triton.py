"""The kernels of GPTQ: against the plain functions (interpreted here, at size on a GPU), and compiled for each card."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from klquant.core.spec import WeightSpec
from klquant.quantize import kernels
from klquant.quantize.gptq import descend, gptq, layer_loss, put_in_order, refit_scales, sweep
from klquant.quantize.rtn import fit_scales, rtn
from tests.triton_interpreter import interpreting, needs_triton, run_interpreted

pytestmark = needs_triton
# Shared memory that a program may have on the card: compute capability → bytes.
SHARED_MEMORY = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10}


@pytest.mark.slow
def test_interpreted():
    run_interpreted("tests/quantize/triton_cases.py")


def test_a_cpu_takes_the_plain_functions():
    assert not kernels.serve(torch.zeros(1))


@pytest.mark.skipif(interpreting, reason="kernels are interpreted in this process")
@pytest.mark.parametrize("card", SHARED_MEMORY)
def test_kernels_compile(card):
    from klquant.quantize.kernels.columns import round_block
    from klquant.quantize.kernels.grouped import GRAM_TOKENS, LINEAR_INPUTS, TILE, add_gram, map_rows
    from klquant.quantize.kernels.scales import normal_equations, search_groups

    grid = {"QMIN": -8, "QMAX": 7}
    block = grid | {"BLOCK": 128, "ROWS": 32}
    names = ("d", "r", "matrix", "scale", "zero", "change", "w", "importance", "factors", "h", "a", "b")
    pointers = dict.fromkeys(names, "*fp32") | {
        "codes": "*i8",
        **dict.fromkeys(("order", "group"), "*i32"),
        "best_scale": "*bf16",
        "best_zero": "*i8",
        "steps": "*bf16",
        "total": "*fp32",
        **dict.fromkeys(("x", "star", "up", "gate", "out"), "*bf16"),
        **dict.fromkeys(("bounds", "tiles"), "*i32"),
        "rows": "*i64",
    }
    jobs = [
        (round_block, block | {"REVISE": False, "zero": None, "change": None}, 1),
        (round_block, block | {"REVISE": True}, 1),
        (search_groups, grid | {"ROWS": 32, "WIDTH": 128}, 4),
        (search_groups, grid | {"ROWS": 1, "WIDTH": 1 << 14, "importance": None, "best_zero": None}, 16),
        (normal_equations, {"ROWS": 128, "COLUMNS": 128, "INNER": 32}, 8),
        (normal_equations, {"ROWS": 128, "COLUMNS": 16, "INNER": 16}, 8),
    ]
    gram, rows = {"TILE": TILE, "TOKENS": GRAM_TOKENS}, {"ROWS": TILE, "INPUTS": LINEAR_INPUTS}
    grouped = [
        (add_gram, gram, 8),
        (add_gram, gram | {"star": None, "rows": None}, 8),
        (map_rows, rows | {"COLUMNS": TILE // 2}, 8),
        (map_rows, rows | {"COLUMNS": TILE, "gate": None, "rows": None}, 8),
    ]
    for kernel, constants, warps, stages in [(*job, 2) for job in jobs] + [(*job, 3) for job in grouped]:
        binary = compiled(kernel, pointers, constants, card, warps, stages)
        assert binary.metadata.shared <= SHARED_MEMORY[card], (kernel, constants)
        assert ".local" not in binary.asm["ptx"]


def compiled(kernel, pointers, constants, card, warps, stages):
    """The kernel built for a card that need not be there."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {x: "constexpr" if x in constants else pointers.get(x, "i32") for x in names}
    aligned = [x for x in names if signature[x].startswith("*") or x in ("n", "k", "width")]
    source = ASTSource(
        kernel,
        signature,
        {(names.index(x),): value for x, value in constants.items()},
        {(names.index(x),): [["tt.divisibility", 16]] for x in aligned},
    )
    return triton.compile(
        source, target=GPUTarget("cuda", card, 32), options={"num_warps": warps, "num_stages": stages}
    )


# On a card.

SHAPES = [(3, 70, 384), (1, 4096, 512), (18, 256, 1024)]
SPECS = [
    WeightSpec(bits=4, group_size=128),
    WeightSpec(bits=3, group_size=32, symmetric=False),
    WeightSpec(bits=8, group_size=-1),
]


def problem(e, n, k, seed=0):
    gen = torch.Generator("cuda").manual_seed(seed)

    def noise(*shape):
        return torch.randn(shape, generator=gen, device="cuda")

    x = noise(e, 2 * k, k) @ (noise(k, k) / k**0.5 + torch.eye(k, device="cuda"))
    x *= torch.logspace(-1, 1, k, device="cuda")
    return noise(e, n, k) / k**0.5, x.mT @ x / (2 * k)


@pytest.mark.gpu
@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_stage_is_the_plain_one(shape, spec):
    w, h = problem(*shape)
    diagonal = h.diagonal(dim1=-2, dim2=-1)
    q = rtn(w, spec)

    def loss(codes_or_q):
        grid = codes_or_q if isinstance(codes_or_q, type(q)) else type(q)(spec, codes_or_q, q.scale, q.zero)
        return layer_loss(w - grid.decode(), h)

    got = fit_scales(w, spec, importance_K=diagonal)[0]
    with kernels.plain():
        want = fit_scales(w, spec, importance_K=diagonal)[0]
    assert (got != want).float().mean() < 1e-3
    stages = [
        lambda: sweep(w, put_in_order(h, 0.01), q.scale, q.zero, spec),
        lambda: refit_scales(w, h, q),
        lambda: descend(w, h, q),
    ]
    for stage in stages:
        got = loss(stage())
        with kernels.plain():
            want = loss(stage())
        torch.testing.assert_close(got, want, rtol=1e-3, atol=0)


@pytest.mark.gpu
def test_bytes_repeat_and_do_not_depend_on_how_many_experts_there_are():
    spec = WeightSpec(bits=4, group_size=128)
    w, h = problem(48, 256, 512)
    run = partial(gptq, spec=spec, damp=0.01, rounds=3)
    whole, again = run(w, h).quantized, run(w, h).quantized
    halves = [run(w[part], h[part]).quantized for part in (slice(0, 16), slice(16, 48))]
    for name in ("codes", "scale"):
        assert torch.equal(getattr(whole, name), getattr(again, name))
        assert torch.equal(getattr(whole, name), torch.cat([getattr(half, name) for half in halves]))


@pytest.mark.gpu
@pytest.mark.parametrize("drift", [False, True])
def test_grouped_work_is_that_of_each_expert(drift):
    from klquant.calibrate.routes import Routes, add_moments, hidden, routed_output
    from klquant.model.weights import MoEWeights
    from klquant.quantize.hessian import Moments

    e, c, i, tokens = 9, 640, 384, 3000
    gen = torch.Generator("cuda").manual_seed(0)

    def noise(*shape):
        return torch.randn(shape, generator=gen, device="cuda").bfloat16()

    weights = MoEWeights(noise(e, c), noise(e), noise(e, i, c) / 25, noise(e, i, c) / 25, noise(e, c, i) / 20, None)
    x, star = noise(tokens, c), noise(tokens, c)
    weight, expert = torch.rand(tokens, e - 1, generator=gen, device="cuda").topk(2, -1)
    part = Routes.sort(weight, expert, e).part(slice(2, 9))

    def run():
        sums = Moments.zeros(c, 7, device="cuda", drift=drift)
        add_moments(sums, x, part, star if drift else None, gathered=False, weighted=False)
        y = routed_output(SimpleNamespace(num_experts=e), weights, x, weight, expert)
        return sums, hidden(weights, slice(2, 9), x, part), y

    (sums, h, y), (again, _, _) = run(), run()
    assert torch.equal(sums.hh, again.hh)
    with kernels.plain():
        want, want_h, want_y = run()
    pairs = [(sums.hh, want.hh, 1e-5), (h, want_h, 1e-2), (y, want_y, 1e-2)]
    for got, reference, most in pairs + [(sums.drift, want.drift, 1e-5)] * drift:
        assert (got.float() - reference.float()).norm() <= most * reference.float().norm()
