"""What the model holds instead of tensors, on a CPU: the same values as the plain weights."""

import pytest
import torch
import torch.nn.functional as F

from klquant.checkpoint.config import KimiLinearConfig
from klquant.kernels.linear.dispatch import QuantLinear, QuantMLP
from klquant.kernels.linear.tiles import linear_tile, make_tile
from klquant.kernels.moe.dispatch import QuantExperts
from klquant.kernels.moe.tiles import joined_tiles, many_tiles
from klquant.model.moe import moe, route
from klquant.model.weights import MLPWeights, MoEWeights, linear
from tests.kernels.build import exact, random_weight
from tests.kernels.launches import meta_weight
from tests.tiny import tiny_config


@pytest.mark.parametrize("bits", [3, 4, 8, 16])
def test_quant_linear_is_a_linear_op(bits):
    w = random_weight((40, 96), bits, 32)
    op = QuantLinear.of(w)
    x = torch.randn(2, 5, 96, dtype=torch.float64)
    assert op.shape == (40, 96)
    assert torch.equal(linear(x, op), F.linear(x, exact(w)))


@pytest.mark.parametrize("bits", [3, 4, 8, 16])
def test_quant_experts_are_the_models_experts(bits):
    cfg = KimiLinearConfig.from_dict(tiny_config(), "config.json")
    hidden, inner, experts = cfg.hidden_size, cfg.moe_intermediate_size, cfg.num_experts
    w1, w3, w2 = (random_weight((experts, *s), bits, 32) for s in ((inner, hidden), (inner, hidden), (hidden, inner)))
    gate, up, down = (random_weight(s, 8, -1) for s in ((inner, hidden), (inner, hidden), (hidden, inner)))
    routed, shared = ([exact(w).float() for w in group] for group in ((w1, w3, w2), (gate, up, down)))
    plain = MoEWeights(torch.randn(experts, hidden), torch.randn(experts), *routed, MLPWeights(*shared))
    packed = QuantExperts.of(w1, w3, w2, QuantMLP.of(gate, up, down))
    x = torch.randn(7, hidden)
    weight, expert = route(cfg, plain, x)
    assert torch.allclose(packed(x, weight, expert.int()), moe(cfg, plain, x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", [3, 4, 8, 16])
@pytest.mark.parametrize("group", [32, 128, -1])
def test_tiles_divide_the_rows_and_fit_small_cards(bits, group):
    for tokens in (1, 8, 9, 16, 17, 32, 33, 128, 129, 5000):
        for n in (576, 2304, 4096):
            op = QuantLinear.of(meta_weight((n, 256), bits, group))
            for wgmma in (False, True):
                tile = linear_tile(op.weight, tokens, False, wgmma)
                assert n % tile.rows == 0
                assert tile.tokens == 8 or tile.tokens < 2 * tokens
                assert tile.stages >= 2
                assert make_tile(bits, tile.rows, tile.tokens, tile.warps, tile.split, tile.stages, tile.scaled) == tile
    shapes = ((1024, 2304), (1024, 2304), (2304, 1024))
    w = QuantExperts.of(*(meta_weight((256, *s), bits, group) for s in shapes), None)
    for tokens in (9, 64, 1024, 4096, 65536):
        for wgmma in (False, True):
            first, second = many_tiles(w.gate_up, w.down, tokens * 8 // w.count, wgmma)
            assert first.tokens == second.tokens
    for tokens in (1, 4, 32):
        first, second = joined_tiles(w.gate_up, w.down, tokens)
        assert (first.tokens, first.warps) == (second.tokens, second.warps)
