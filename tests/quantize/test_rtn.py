import pytest
import torch

from klquant.core.grid import Quantized, encode
from klquant.core.spec import WeightSpec
from klquant.errors import UserError
from klquant.quantize.rtn import SHRINK, fit_scales, rtn

SPECS = [
    WeightSpec(bits=bits, group_size=group, symmetric=symmetric)
    for bits in (3, 4, 8) for group in (32, 64, 128, -1) for symmetric in (True, False)
]  # fmt: skip


def weights(*shape, seed=0):
    gen = torch.Generator().manual_seed(seed)
    # Heavy tails and a shifted row: what makes clipping and zero points matter.
    w = torch.randn(shape, generator=gen) * torch.rand(shape, generator=gen).pow(-0.3)
    return w + 0.5 * torch.arange(shape[-2])[:, None] / shape[-2]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_scales_are_stored_values_and_codes_are_nearest(spec):
    w = weights(5, 128)
    q = rtn(w, spec)
    assert q.scale.dtype == torch.bfloat16 and bool((q.scale > 0).all())
    assert int(q.codes.min()) >= spec.qmin and int(q.codes.max()) <= spec.qmax
    assert torch.equal(q.codes, encode(w, q.scale, q.zero, spec))
    # No neighbouring code comes closer: nothing is gained by another rounding on these scales.
    error = (q.decode() - w).abs()
    for step in (-1, 1):
        other = (q.codes + step).clamp(spec.qmin, spec.qmax)
        neighbour = type(q)(spec, other, q.scale, q.zero)
        assert bool((error <= (neighbour.decode() - w).abs() + 1e-6).all())


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_searched_scales_beat_the_full_range(spec):
    w = weights(16, 128, seed=3)
    q = rtn(w, spec)
    grouped = w.unflatten(-1, (spec.groups(128), -1))
    low, high = grouped.amin(-1).clamp_max(0), grouped.amax(-1).clamp_min(0)
    if spec.symmetric:
        scale, zero = torch.maximum(-low / -spec.qmin, high / spec.qmax).bfloat16(), None
    else:
        scale = ((high - low) / (spec.qmax - spec.qmin)).bfloat16()
        zero = (spec.qmin - low / scale.float()).round().clamp(spec.qmin, spec.qmax).to(torch.int8)
    plain = type(q)(spec, encode(w, scale, zero, spec), scale, zero)
    assert (q.decode() - w).square().sum() <= (plain.decode() - w).square().sum()


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_no_shrinking_of_both_ends_of_a_range_loses_less(bits):
    w, spec = weights(64, 128, seed=4), WeightSpec(bits=bits, group_size=32, symmetric=False)

    def loss(q):
        return (q.decode() - w).square().unflatten(-1, (-1, 32)).sum(-1)

    found = loss(rtn(w, spec))
    low, high = (f(w.unflatten(-1, (-1, 32)), -1) for f in (torch.amin, torch.amax))
    for factor in SHRINK[bits]:
        scale = ((high.clamp_min(0) - low.clamp_max(0)) / (spec.qmax - spec.qmin) * factor).bfloat16()
        zero = (spec.qmin - low.clamp_max(0) * factor / scale.float()).round().clamp(spec.qmin, spec.qmax)
        other = Quantized(spec, encode(w, scale, zero.to(torch.int8), spec), scale, zero.to(torch.int8))
        assert bool((found <= loss(other) * (1 + 1e-5)).all()), factor


def test_importance_moves_the_error_away_from_what_counts():
    spec = WeightSpec(bits=3, group_size=32)
    w = weights(64, 64, seed=1)
    importance = torch.ones(64)
    importance[::4] = 50.0
    plain, weighted = rtn(w, spec), rtn(w, spec, importance_K=importance)
    loss = [((q.decode() - w).square() * importance).sum() for q in (plain, weighted)]
    assert loss[1] < loss[0]


def test_a_group_of_zeros_stays_zero_with_a_finite_scale():
    for spec in SPECS:
        q = rtn(torch.zeros(2, 128), spec)
        assert bool((q.scale > 0).all()) and bool((q.decode() == 0).all())


def test_batches_are_independent():
    spec = WeightSpec(bits=4, group_size=32)
    w = torch.stack([weights(6, 64, seed=s) for s in range(3)])
    scale, _ = fit_scales(w, spec)
    for e in range(3):
        assert torch.equal(scale[e], fit_scales(w[e], spec)[0])


def test_a_group_that_does_not_divide_the_row_is_named():
    with pytest.raises(UserError, match="96 input features are not a multiple of group size 64"):
        WeightSpec(bits=4, group_size=64).groups(96)
