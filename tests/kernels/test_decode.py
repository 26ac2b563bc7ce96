"""The decode steps in plain torch: step by step they are the model's whole sequence, and only their own rows matter."""

import pytest
import torch
from torch import Tensor

from klquant.checkpoint.config import KimiLinearConfig
from klquant.kernels.kda.dispatch import KDADecode, kda_decode
from klquant.kernels.mla.dispatch import mla_decode, write_latent
from klquant.kernels.mla.pages import PAGE_SIZE, LatentPages, read_latent
from klquant.kernels.moe.dispatch import route_tokens
from klquant.kernels.norm.dispatch import add_rms_norm
from klquant.model.kda import kda_mix
from klquant.model.mla import mla_mix
from klquant.model.moe import route
from klquant.model.norm import rms_norm
from klquant.model.weights import DictSource, KDAWeights, LayerWeights, MLAWeights, linear
from tests.tiny import tiny_config, tiny_tensors

NAN = float("nan")


@pytest.fixture(scope="module")
def layers() -> tuple[KimiLinearConfig, LayerWeights, LayerWeights]:
    """A KDA layer and an MLA layer, both with experts, in FP32."""
    cfg = KimiLinearConfig.from_dict(tiny_config())
    source = DictSource(cfg, tiny_tensors(tiny_config()))
    return cfg, *(LayerWeights.load(source, layer, torch.float32, "cpu") for layer in (1, 3))


def kda_weights(w: KDAWeights) -> KDADecode:
    taps = torch.cat([w.q_conv, w.k_conv, w.v_conv])
    return KDADecode(taps, w.A_log, w.dt_bias, w.f_b_proj, w.g_b_proj, w.o_norm)


def kda_inputs(w: KDAWeights, x: Tensor) -> tuple[Tensor, Tensor]:
    """qkv and low of x [.., C]."""
    qkv = torch.cat([linear(x, p) for p in (w.q_proj, w.k_proj, w.v_proj)], -1)
    return qkv, torch.cat([linear(x, p) for p in (w.f_a_proj, w.g_a_proj, w.b_proj)], -1)


def test_kda_step_by_step_is_the_whole_sequence(layers):
    cfg, layer, _ = layers
    torch.manual_seed(0)
    x = torch.randn(2, 70, cfg.hidden_size)
    want = kda_mix(cfg, layer.attn, x)
    qkv, low = kda_inputs(layer.attn, x)
    conv = torch.full((5, 3 * cfg.kda_width, cfg.conv_width - 1), NAN)
    s = torch.full((5, cfg.kda_heads, cfg.kda_dim, cfg.kda_dim), NAN)
    slot = torch.tensor([3, -1, 1], dtype=torch.int32)
    conv[[3, 1]], s[[3, 1]] = 0, 0
    for t in range(x.shape[1]):
        rows = [torch.stack([y[0, t], torch.full_like(y[0, t], NAN), y[1, t]]) for y in (qkv, low)]
        out = kda_decode(*rows, kda_weights(layer.attn), conv, s, slot, cfg.rms_eps)
        assert torch.allclose(out[[0, 2]], want[:, t], atol=1e-5)
        assert not out[1].any()
    assert conv[[0, 2, 4]].isnan().all()
    assert s[[0, 2, 4]].isnan().all()


def paged(batch: int, longest: int) -> tuple[Tensor, Tensor]:
    """A page table of `batch` sequences whose pages lie criss-cross, and the positions [B, longest] it gives."""
    most = -(-longest // PAGE_SIZE)
    table = torch.randperm(batch * most + 2)[: batch * most].view(batch, most).int()
    t = torch.arange(longest)
    return table, table[:, t // PAGE_SIZE].long() * PAGE_SIZE + t % PAGE_SIZE


# 8 bits: as far as rounding moves a value, FP8 relative to itself, INT8 to a token's largest (some three sigma).
@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1e-5), (torch.float8_e4m3fn, 2**-4), (torch.int8, 3 / 254)]
)
def test_mla_step_by_step_is_the_whole_sequence(layers, dtype, limit):
    cfg, _, layer = layers
    w: MLAWeights = layer.attn
    torch.manual_seed(0)
    x = torch.randn(2, 130, cfg.hidden_size)
    want = mla_mix(cfg, w, x)
    table, position = paged(2, x.shape[1])
    pages = LatentPages.empty(8, cfg.latent_dim, dtype, "cpu")
    pages.data.view(torch.uint8).fill_(0x7F)
    table = torch.cat([table, torch.full_like(table[:1], 10**6)])
    write_latent(linear(x, w.kv_a_proj).flatten(0, 1), w.kv_a_norm, pages, position.flatten())
    for t in (0, 1, 63, 64, 129):
        q = linear(x[:, t], w.q_proj).unflatten(-1, (cfg.num_heads, -1))
        q = torch.cat([q, torch.full_like(q[:1], NAN)])
        length = torch.tensor([t + 1, t + 1, 0], dtype=torch.int32)
        out = mla_decode(q, w.kv_b_proj, pages, table, length, cfg.qk_dim**-0.5)
        assert (out[:2] - want[:, t]).norm() < limit * want[:, t].norm()
        assert not out[2].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.int8])
def test_latents_come_back(dtype):
    torch.manual_seed(0)
    kv_a, weight = torch.randn(200, 40).bfloat16(), torch.rand(32).bfloat16()
    kv_a[7] = 0
    _, position = paged(1, 200)
    pages = LatentPages.empty(6, 40, dtype, "cpu")
    pages.data.view(torch.uint8).fill_(0x11)
    untouched = pages.data.view(torch.uint8).clone()
    position = position[0]
    position[50] = -1
    write_latent(kv_a, weight, pages, position)
    want = torch.cat([rms_norm(kv_a[:, :32], weight, 1e-6), kv_a[:, 32:]], -1)
    back = read_latent(pages, position.clamp_min(0), torch.bfloat16)
    assert back.dtype == torch.bfloat16
    kept = torch.arange(200) != 50
    step = {torch.bfloat16: 0, torch.float8_e4m3fn: 2**-4, torch.int8: 0.5 / 127}[dtype]
    # FP8 rounds each value, INT8 each to a grid as wide as the largest; BF16 rounds what comes back.
    size = want.abs() if dtype == torch.float8_e4m3fn else want.abs().amax(-1, keepdim=True)
    bound = step * size + 2**-8 * want.abs() + (want.abs().amax(-1, keepdim=True) / 448 * 2**-9 if step else 0)
    assert ((back - want).abs() <= bound)[kept].all()
    assert dtype != torch.bfloat16 or torch.equal(back[kept], want[kept])
    outside = torch.ones(6 * PAGE_SIZE, dtype=torch.bool)
    outside[position[kept]] = False
    after = pages.data.view(torch.uint8).flatten(0, 1)
    assert torch.equal(after[outside], untouched.flatten(0, 1)[outside])


def test_add_rms_norm_is_the_models():
    torch.manual_seed(0)
    h, delta, weight = torch.randn(5, 24).bfloat16(), torch.randn(5, 24).bfloat16(), torch.rand(24).bfloat16()
    total, normed = add_rms_norm(h, delta, weight, 1e-5)
    assert torch.equal(total, h + delta)
    assert torch.equal(normed, rms_norm(h + delta, weight, 1e-5))
    assert torch.equal(add_rms_norm(h, None, weight, 1e-5)[1], rms_norm(h, weight, 1e-5))


def test_a_wide_stream_is_rounded_in_the_norm_only():
    torch.manual_seed(0)
    h, delta, weight = torch.randn(5, 24), torch.randn(5, 24).bfloat16(), torch.rand(24).bfloat16()
    total, normed = add_rms_norm(h, delta, weight, 1e-5)
    assert torch.equal(total, h + delta.float()) and normed.dtype == torch.bfloat16
    assert torch.equal(normed, rms_norm(h + delta.float(), weight.float(), 1e-5).bfloat16())


def test_route_tokens_is_the_models(layers):
    cfg, layer, _ = layers
    x = torch.randn(9, cfg.hidden_size).bfloat16()
    w = layer.mlp
    weight, expert = route_tokens(x, w.router, w.router_bias, cfg.top_k, cfg.routed_scaling, cfg.renormalize)
    want, chosen = route(cfg, w, x)
    assert torch.equal(expert, chosen.int())
    assert torch.allclose(weight, want)
