from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from klquant.checkpoint.config import KimiLinearConfig
from klquant.model.moe import assignments, experts, moe, route
from klquant.model.weights import DictSource, LayerWeights
from tests.tiny import tiny_config, tiny_tensors


def layer(**changes):
    raw = tiny_config(**changes)
    cfg = KimiLinearConfig.from_dict(raw)
    return cfg, LayerWeights.load(DictSource(cfg, tiny_tensors(raw)), 1, torch.float32, "cpu").mlp


def test_bias_chooses_and_does_not_weigh():
    cfg, w = layer()
    x = torch.randn(5, 64)
    w = replace(w, router_bias=torch.tensor([0.0, 0, 0, 9, 0, 0, 9, 0]))
    weight, expert = route(cfg, w, x)
    assert expert.sort(-1).values.tolist() == [[3, 6]] * 5
    scores = F.linear(x, w.router).sigmoid().gather(-1, expert)
    assert torch.allclose(weight, scores / scores.sum(-1, keepdim=True) * 2.446)


@pytest.mark.parametrize("renormalize", [True, False])
def test_groups_as_transformers_does(renormalize):
    from transformers.models.kimi_linear import modeling_kimi_linear as modeling

    cfg, w = layer(num_expert_group=4, topk_group=2, moe_renormalize=renormalize)
    router = modeling.KimiLinearTopkRouter.__new__(modeling.KimiLinearTopkRouter)
    torch.nn.Module.__init__(router)
    vars(router).update(
        top_k=2, num_experts=8, hidden_dim=64, routed_scaling_factor=2.446, num_group=4, topk_group=2,
        norm_topk_prob=renormalize, weight=w.router, e_score_correction_bias=w.router_bias,
    )  # fmt: skip
    x = torch.randn(300, 64)
    _, weight_ref, expert_ref = router(x)
    weight, expert = route(cfg, w, x)
    order, order_ref = expert.argsort(-1), expert_ref.argsort(-1)
    assert torch.equal(expert.gather(-1, order), expert_ref.gather(-1, order_ref))
    assert torch.allclose(weight.gather(-1, order), weight_ref.gather(-1, order_ref))


def test_assignments_partition_the_routes():
    expert_TR = torch.tensor([[4, 1], [1, 0], [4, 0], [0, 7]])
    got = {e: list(zip(t.tolist(), s.tolist(), strict=True)) for e, t, s in assignments(expert_TR, 8)}
    assert got == {0: [(1, 1), (2, 1), (3, 0)], 1: [(0, 1), (1, 0)], 4: [(0, 0), (2, 0)], 7: [(3, 1)]}
    assert list(got) == sorted(got)


def test_experts_equal_the_weighted_sum():
    cfg, w = layer()
    x = torch.randn(37, 64)
    weight, expert = route(cfg, w, x)
    want = torch.zeros_like(x)
    for t in range(37):
        for r in range(2):
            e = expert[t, r]
            want[t] += weight[t, r] * (w.w2[e] @ (F.silu(w.w1[e] @ x[t]) * (w.w3[e] @ x[t])))
    assert torch.allclose(experts(cfg, w, x, weight, expert), want, atol=1e-5)
    assert torch.equal(moe(cfg, w, x), moe(cfg, w, x))


def test_a_token_does_not_see_the_others():
    cfg, w = layer()
    x = torch.randn(9, 64)
    alone = torch.cat([moe(cfg, w, row[None]) for row in x])
    assert torch.allclose(moe(cfg, w, x), alone, atol=1e-5)
