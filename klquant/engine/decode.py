"""One token for each of B sequences, through packed weights and state pools: what a CUDA graph captures.

The same functions run on a CPU, through the references of their operations. Between two layers the stream is a pair
(h, delta) whose sum is meant: the next norm adds them on the way. Shape suffixes as in `klquant.model.weights`.
"""

import torch.nn.functional as F
from torch import Tensor

from klquant.checkpoint.config import KimiLinearConfig
from klquant.engine.state import DeviceState, StepRows
from klquant.engine.weights import EngineLayer, FusedKDA, FusedMLA
from klquant.kernels.kda.dispatch import kda_decode
from klquant.kernels.kda.weights import KDADecode
from klquant.kernels.mla.dispatch import mla_decode, write_latent
from klquant.kernels.moe.dispatch import route_tokens
from klquant.kernels.norm.dispatch import add_rms_norm
from klquant.model.moe import mlp, moe
from klquant.model.weights import MoEWeights, PackedMoE, linear

Stream = tuple[Tensor, Tensor | None]


def decode_layer(
    cfg: KimiLinearConfig, layer: int, w: EngineLayer, stream: Stream, state: DeviceState, rows: StepRows
) -> Stream:
    """Layer `layer` for one token a row: (h, delta) [B, C] → (h, delta). State is updated in place."""
    h_BC, x_BC = add_rms_norm(*stream, w.model.input_norm, cfg.rms_eps)
    mix = kda_mix if isinstance(w.fused, FusedKDA) else mla_mix
    mixed = linear(mix(cfg, layer, w.fused, x_BC, state, rows), w.fused.o_proj)
    h_BC, x_BC = add_rms_norm(h_BC, mixed, w.model.post_norm, cfg.rms_eps)
    return h_BC, feed(cfg, w.model.mlp, x_BC)


def kda_mix(
    cfg: KimiLinearConfig, layer: int, w: FusedKDA, x_BC: Tensor, state: DeviceState, rows: StepRows
) -> Tensor:  # fmt: skip
    """[B, C] → [B, F]; rows of padding give 0."""
    pool = state.kda[layer]
    between = KDADecode(w.taps_FW, w.A_log, w.dt_bias, w.f_b, w.g_b, w.o_norm)
    return kda_decode(linear(x_BC, w.qkv), linear(x_BC, w.low), between, pool.conv, pool.s, rows.slot_B, cfg.rms_eps)


def mla_mix(
    cfg: KimiLinearConfig, layer: int, w: FusedMLA, x_BC: Tensor, state: DeviceState, rows: StepRows
) -> Tensor:  # fmt: skip
    """[B, C] → [B, H·v]; rows of padding give 0."""
    pages = state.latent[layer]
    q, kv_a = linear(x_BC, w.q_kv_a).split([cfg.num_heads * cfg.qk_dim, cfg.latent_dim], -1)
    write_latent(kv_a, w.kv_a_norm, pages, rows.position_B)
    q_BHK = q.unflatten(-1, (cfg.num_heads, cfg.qk_dim))
    return mla_decode(q_BHK, w.kv_b, pages, rows.table_BM, rows.length_B, cfg.qk_dim**-0.5)


def feed(cfg: KimiLinearConfig, w: object, x_BC: Tensor) -> Tensor:
    """MLP or experts, [B, C] → [B, C]."""
    if isinstance(w, PackedMoE) and cfg.num_groups == 1:
        routes = route_tokens(x_BC, w.router, w.router_bias, cfg.top_k, cfg.routed_scaling, cfg.renormalize)
        return w.experts(x_BC, *routes)
    return moe(cfg, w, x_BC) if isinstance(w, MoEWeights | PackedMoE) else mlp(w, x_BC)


def embed(ids_B: Tensor, embedding_VC: Tensor) -> Tensor:
    """Rows of the embedding. −1, the token of logits that were not numbers, reads any row: its answer has ended."""
    return F.embedding(ids_B.clamp_min(0), embedding_VC)
