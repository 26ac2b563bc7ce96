"""A chunk of one sequence, through packed weights and state pools: the sister of `klquant.engine.decode`.

The same functions run on a CPU, through the references of their operations. The stream is a pair (h, delta) here too.
Shape suffixes as in `klquant.model.weights`.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from klquant.checkpoint.config import KimiLinearConfig
from klquant.engine.decode import Stream, decode_layer, feed
from klquant.engine.state import DeviceState, StepRows, page_position
from klquant.engine.weights import EngineLayer, FusedKDA, FusedMLA
from klquant.kernels.kda.dispatch import prefill_inputs
from klquant.kernels.mla.dispatch import join, keys_values, read_latent, write_latent
from klquant.kernels.mla.pages import LatentPages
from klquant.kernels.norm.dispatch import add_rms_norm, gated_rms_norm
from klquant.model import mla as model_mla
from klquant.model.delta import gated_delta_rule
from klquant.model.weights import linear


@dataclass(frozen=True)
class ChunkRows:
    """Positions start … stop − 1 of the sequence in a slot. table_M int32: its pages; position_S int64: where the
    positions' latents lie."""

    slot: int
    start: int
    stop: int
    table_M: Tensor
    position_S: Tensor

    @classmethod
    def of(cls, state: DeviceState, slot: int, start: int, stop: int) -> "ChunkRows":
        table_M = state.table[slot]
        return cls(slot, start, stop, table_M, page_position(table_M, torch.arange(start, stop, device=table_M.device)))

    @cached_property
    def as_rows(self) -> StepRows:
        """A chunk of one position as the row of a decode step."""
        slot_B = torch.full_like(self.position_S, self.slot)
        length_B = torch.full_like(slot_B, self.stop, dtype=torch.int32)
        return StepRows(slot_B.int(), slot_B, self.table_M[None], length_B, self.position_S)


def prefill_layer(
    cfg: KimiLinearConfig, layer: int, w: EngineLayer, stream: Stream, state: DeviceState, chunk: ChunkRows
) -> Stream:
    """Layer `layer` for the positions of a chunk: (h, delta) [S, C] → (h, delta). State is updated in place."""
    if chunk.stop - chunk.start == 1:
        return decode_layer(cfg, layer, w, stream, state, chunk.as_rows)
    h_SC, x_SC = add_rms_norm(*stream, w.model.input_norm, cfg.rms_eps)
    mix = kda_mix if isinstance(w.fused, FusedKDA) else mla_mix
    mixed = linear(mix(cfg, layer, w.fused, x_SC, state, chunk), w.fused.o_proj)
    h_SC, x_SC = add_rms_norm(h_SC, mixed, w.model.post_norm, cfg.rms_eps)
    return h_SC, feed(cfg, w.model.mlp, x_SC)


def kda_mix(
    cfg: KimiLinearConfig, layer: int, w: FusedKDA, x_SC: Tensor, state: DeviceState, chunk: ChunkRows
) -> Tensor:
    """[S, C] → [S, F]."""
    heads, rank = (cfg.kda_heads, cfg.kda_dim), w.f_b.shape[1]
    pool, slot = state.kda[layer], slice(chunk.slot, chunk.slot + 1)
    f_a, g_a, b_SH = linear(x_SC, w.low).split([rank, rank, cfg.kda_heads], -1)
    q, k, v, beta = prefill_inputs(linear(x_SC, w.qkv)[None], b_SH[None], w.taps_FW, pool.conv[slot])
    raw = F.linear(f_a, w.f_b).unflatten(-1, heads)
    o, s = gated_delta_rule(q, k, v, raw[None], w.A_log, w.dt_bias, beta, pool.s[slot])
    pool.s[slot] = s
    gate = F.linear(g_a, w.g_b).unflatten(-1, heads)
    return gated_rms_norm(o[0], gate, w.o_norm, cfg.rms_eps).flatten(-2)


def mla_mix(
    cfg: KimiLinearConfig, layer: int, w: FusedMLA, x_SC: Tensor, state: DeviceState, chunk: ChunkRows
) -> Tensor:
    """[S, C] → [S, H·v]. What attention sees of a token is what its page holds, rounding included."""
    pages = state.latent[layer]
    q, kv_a = linear(x_SC, w.q_kv_a).split([cfg.num_heads * cfg.qk_dim, cfg.latent_dim], -1)
    write_latent(kv_a, w.kv_a_norm, pages, chunk.position_S)
    q_HSK = q.unflatten(-1, (cfg.num_heads, cfg.qk_dim)).transpose(0, 1)

    def expand(start: int, stop: int) -> tuple[Tensor, Tensor]:
        return _expand(cfg, w.kv_b, pages, chunk.table_M, start, stop, x_SC.dtype)

    own = expand(chunk.start, chunk.stop)
    if not chunk.start:
        o_HSV = F.scaled_dot_product_attention(*(x[None] for x in (q_HSK, *own)), is_causal=True)[0]
        return o_HSV[..., : cfg.v_dim].transpose(0, 1).flatten(1)
    o_HSV, total_HS = _attend(q_HSK, *own, causal=True)
    for start in range(0, chunk.start, model_mla.LATENT_BLOCK):
        stop = min(start + model_mla.LATENT_BLOCK, chunk.start)
        past = _attend(q_HSK, *expand(start, stop))
        dtype = x_SC.dtype if stop == chunk.start else total_HS.dtype
        o_HSV, total_HS = join(o_HSV, total_HS, *past, cfg.v_dim, dtype)
    return o_HSV.transpose(0, 1).flatten(1)


def _expand(
    cfg: KimiLinearConfig, kv_b: Tensor, pages: LatentPages, table_M: Tensor, start: int, stop: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Keys and values [H, stop − start, ·] of the latents at positions start … stop − 1."""
    latent_TL = read_latent(pages, table_M, start, stop, dtype)
    latent_TK, shared_TR = latent_TL.split([cfg.kv_rank, cfg.qk_rope_dim], -1)
    return keys_values(F.linear(latent_TK, kv_b), shared_TR, cfg.num_heads, cfg.qk_nope_dim)


def _attend(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> tuple[Tensor, Tensor]:
    """`part_attention` of one sequence."""
    o, log_sum = model_mla.part_attention(q[None], k[None], v[None], causal)
    return o[0], log_sum[0]
