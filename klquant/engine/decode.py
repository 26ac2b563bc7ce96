"""One token for each of B sequences, through packed weights and state pools: what a CUDA graph captures.

The same functions run on a CPU, through the references of their operations. Between two layers the stream is a pair
(h, delta) whose sum is meant, delta in parts perhaps: the next norm adds them on the way. h is FP32: rounding it to
BF16 layer after layer would add a quarter to what 16-bit activations cost. Shape suffixes as in
`klquant.model.weights`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from klquant.checkpoint.config import KimiLinearConfig
from klquant.engine.state import DeviceState, StepRows
from klquant.engine.weights import EngineLayer, FusedKDA
from klquant.kernels.kda.dispatch import kda_decode
from klquant.kernels.kda.weights import KDADecode
from klquant.kernels.linear.dispatch import QuantLinear, QuantMLP
from klquant.kernels.mla.dispatch import mla_decode, write_latent
from klquant.kernels.moe.dispatch import add_rms_norm_route, route_tokens
from klquant.kernels.norm.dispatch import add_rms_norm
from klquant.kernels.norm.parts import Parts
from klquant.model.moe import mlp, moe
from klquant.model.weights import Linear, MoEWeights, PackedMoE, linear, wide_linear

Stream = tuple[Tensor, Tensor | Parts | None]


def decode_layer(
    cfg: KimiLinearConfig, layer: int, w: EngineLayer, stream: Stream, state: DeviceState, rows: StepRows
) -> Stream:
    """Layer `layer` for one token a row: (h, delta) [B, C] → (h, delta). State is updated in place."""
    mix = kda_mix if isinstance(w.fused, FusedKDA) else mla_mix
    # The layer's first launch clears what programs of its router and its experts count in.
    tokens, each = len(stream[0]), 1 << (cfg.top_k + 1).bit_length()
    turns = torch.empty(tokens, each, dtype=torch.int32, device=stream[0].device)
    h_BC, mixed_BF = mix(cfg, layer, w, stream, state, rows, turns)
    o_proj = w.fused.o_proj
    delta_BC = o_proj.parts(mixed_BF) if isinstance(o_proj, QuantLinear) else wide_linear(mixed_BF, o_proj)
    if isinstance(w.model.mlp, PackedMoE) and cfg.num_groups == 1:
        h_BC, x_BC, *routes = add_rms_norm_route(
            h_BC, delta_BC, w.model.post_norm, cfg.rms_eps, *choice(cfg, w.model.mlp), turns.view(-1)[:tokens]
        )
        return h_BC, w.model.mlp.experts.parts(x_BC, *routes, turns.view(-1)[tokens:], rows.slot_B)
    h_BC, x_BC = add_rms_norm(h_BC, delta_BC, w.model.post_norm, cfg.rms_eps)
    return h_BC, feed(cfg, w.model.mlp, x_BC)


def kda_mix(
    cfg: KimiLinearConfig,
    layer: int,
    w: EngineLayer,
    stream: Stream,
    state: DeviceState,
    rows: StepRows,
    turns: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(h, delta) → their sum [B, C] and what the output projection reads [B, F], 0 in rows of padding."""
    pool, fused = state.kda[layer], w.fused
    h_BC, x_BC = add_rms_norm(*stream, w.model.input_norm, cfg.rms_eps, turns)
    qkv, low_BL = both(x_BC, fused.qkv, fused.low)
    between = KDADecode(fused.taps_FW, fused.A_log, fused.dt_bias, fused.f_b, fused.g_b, fused.o_norm)
    return h_BC, kda_decode(qkv, low_BL, between, pool.conv, pool.s, rows.slot_B, cfg.rms_eps)


def both(x_BC: Tensor, large: Linear, small: Linear) -> tuple[Tensor, Tensor]:
    """x through two maps: in one launch if a packed one can take a plain one along."""
    if isinstance(large, QuantLinear) and isinstance(small, Tensor):
        return large.beside(x_BC, small)
    return linear(x_BC, large), linear(x_BC, small)


def mla_mix(
    cfg: KimiLinearConfig,
    layer: int,
    w: EngineLayer,
    stream: Stream,
    state: DeviceState,
    rows: StepRows,
    turns: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(h, delta) → their sum [B, C] and what the output projection reads [B, H·v], 0 in rows of padding."""
    pages, fused = state.latent[layer], w.fused
    h_BC, x_BC = add_rms_norm(*stream, w.model.input_norm, cfg.rms_eps, turns)
    q, kv_a = linear(x_BC, fused.q_kv_a).split([cfg.num_heads * cfg.qk_dim, cfg.latent_dim], -1)
    write_latent(kv_a, fused.kv_a_norm, pages, rows.position_B)
    q_BHK = q.unflatten(-1, (cfg.num_heads, cfg.qk_dim))
    return h_BC, mla_decode(q_BHK, fused.kv_b, pages, rows.table_BM, rows.length_B, cfg.qk_dim**-0.5)


def feed(cfg: KimiLinearConfig, w: object, x_BC: Tensor) -> Tensor | Parts:
    """MLP or experts, [B, C] → [B, C]."""
    if isinstance(w, QuantMLP):
        return w.parts(x_BC)
    if isinstance(w, PackedMoE) and cfg.num_groups == 1:
        return w.experts(x_BC, *route_tokens(x_BC, *choice(cfg, w)))
    return moe(cfg, w, x_BC) if isinstance(w, MoEWeights | PackedMoE) else mlp(w, x_BC)


def choice(cfg: KimiLinearConfig, w: PackedMoE) -> tuple[Tensor, Tensor, int, float, bool]:
    """What `route_tokens` asks for behind the tokens."""
    return w.router, w.router_bias, cfg.top_k, cfg.routed_scaling, cfg.renormalize


def embed(ids_B: Tensor, embedding_VC: Tensor) -> Tensor:
    """Rows of the embedding, FP32. −1, the token of logits that were no numbers, reads any row: its answer is over."""
    return F.embedding(ids_B.clamp_min(0), embedding_VC).float()
