import torch

from klquant.core.spec import WeightSpec
from klquant.quantize.awq import Consumer, clipped, search_scale
from klquant.quantize.gptq import layer_loss
from klquant.quantize.rtn import rtn

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


def test_clipping_lowers_the_loss_of_each_group():
    for spec in (SPEC, WeightSpec(bits=3, group_size=32), WeightSpec(bits=4, group_size=32, symmetric=False)):
        w, h = problem(4)
        w[:, ::7] *= w.abs()[:, ::7]  # outliers worth clipping
        for g in range(K // 32):
            part = slice(32 * g, 32 * g + 32)
            block = h[:, part, part]
            found, plain = clipped(w, h, spec).decode(), rtn(w, spec).decode()
            losses = [layer_loss((w - v)[..., part], block).sum() for v in (found, plain)]
            assert losses[0] < 1.05 * losses[1]
