import pytest
import torch

from klquant.core.grid import Quantized, encode
from klquant.core.spec import WeightSpec
from klquant.quantize.awq import CLIP, Consumer, _full_scale, clipped, search_scale
from klquant.quantize.gptq import layer_loss
from klquant.quantize.rtn import rtn
from tests.quantize import test_gptq

N, K = 48, 128
SPEC = WeightSpec(bits=4, group_size=128)


def problem(seed=0, experts=2):
    """A few input channels are far more active than the rest, with room for larger weights there: AWQ's premise."""
    gen = torch.Generator().manual_seed(seed)
    level = torch.ones(K)
    level[::25] = 12
    x = torch.randn(experts, 400, K, generator=gen) * level
    return torch.randn(experts, N, K, generator=gen) / level.sqrt(), x.mT @ x / 400


def loss_at(w, h, scale):
    s = scale.unsqueeze(-2)
    return layer_loss((w * s - clipped(w * s, h / (s * s.mT), SPEC).decode()) / s, h).sum()


def test_the_scale_found_helps_and_is_a_power_of_two():
    w, h = problem()
    activity = h.mean(0).diagonal().sqrt()
    scale = search_scale([Consumer(w, h, SPEC)], activity, grid=20)
    assert torch.equal(torch.exp2(torch.log2(scale).round()), scale)
    assert loss_at(w, h, scale) < 0.8 * loss_at(w, h, torch.ones(K))


def test_experts_may_have_scales_of_their_own():
    w, h = problem(1)
    h[1] = h[1].flip(-1, -2)  # the second expert's active channels lie elsewhere
    activity = h.diagonal(dim1=-2, dim2=-1).sqrt()
    own = search_scale([Consumer(w, h, SPEC)], activity, grid=20)
    shared = search_scale([Consumer(w, h, SPEC)], activity.square().mean(0).sqrt(), grid=20)
    assert own.shape == (2, K) and shared.shape == (K,)
    assert loss_at(w, h, own) < loss_at(w, h, shared.expand(2, K))


def test_consumers_that_are_kept_do_not_count():
    w, h = problem(2)
    activity = h.mean(0).diagonal().sqrt()
    alone = search_scale([Consumer(w, h, SPEC)], activity, grid=10)
    with_kept = search_scale([Consumer(w, h, SPEC), Consumer(100 * w, h, None)], activity, grid=10)
    assert torch.equal(alone, with_kept)


def test_even_activity_leaves_the_weight_alone():
    w, _ = problem(3)
    scale = search_scale([Consumer(w, torch.eye(K).expand(2, K, K), SPEC)], torch.ones(K), grid=10)
    assert bool((scale == 1).all())


@pytest.mark.parametrize("least", [1e-8, 0.0])
def test_a_channel_that_is_hardly_active_is_not_scaled_away(least):
    """Scales stop at 1e-4 of the largest, though the rest wants each channel scaled by all of its activity."""
    activity = torch.linspace(0.05, 1, K)
    activity[7] = least
    w = torch.randn(1, N, K, generator=torch.Generator().manual_seed(9)) / activity.clamp_min(0.05)
    scale = search_scale([Consumer(w, activity.square().diag(), SPEC)], activity, grid=4)
    assert scale.min() == scale[7] == 2**-13 and scale[0] < 0.1


CLIPPED = [SPEC, WeightSpec(bits=3, group_size=32), WeightSpec(bits=4, group_size=32, symmetric=False)]


def group_losses(d, h, spec):
    """d_g H_gg d_gᵀ of every row and group, [E, N, G]."""
    width = spec.width(K)
    parts = [slice(start, start + width) for start in range(0, K, width)]
    return torch.stack([((d[..., p] @ h[:, p, p]) * d[..., p]).sum(-1) for p in parts], -1)


@pytest.mark.parametrize("spec", CLIPPED, ids=str)
def test_no_other_clipping_of_a_group_loses_less(spec):
    w, h = problem(4)
    w[:, ::7] *= w.abs()[:, ::7]  # outliers worth clipping
    found = group_losses(w - clipped(w, h, spec).decode(), h, spec)
    for shrink in CLIP:
        scale, zero = _full_scale(w.unflatten(-1, (-1, spec.width(K))), spec, shrink)
        other = Quantized(spec, encode(w, scale, zero, spec), scale, zero)
        assert bool((found <= group_losses(w - other.decode(), h, spec) * (1 + 1e-4)).all()), shrink


@pytest.mark.parametrize("spec", CLIPPED, ids=str)
@pytest.mark.parametrize("unseen", [slice(12, 13), slice(32, 64)], ids=["one input", "a group"])
def test_clipping_spares_inputs_never_seen(spec, unseen):
    """About as well as RTN does, though one of them sets the range of its group."""
    w, h = test_gptq.problem(8, k=K)
    h[:, unseen], h[:, :, unseen] = 0, 0
    w[..., unseen.start] *= 3
    ours, plain = ((w - q.decode())[..., unseen].square().sum() for q in (clipped(w, h, spec), rtn(w, spec)))
    assert float(ours) < 1.5 * float(plain)
