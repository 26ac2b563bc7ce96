"""Chunks of sequences, through packed weights and state pools: the sister of `klquant.engine.decode`.

The same functions run on a CPU, through the references of their operations. The stream is a pair (h, delta) here too.
Shape suffixes as in `klquant.model.weights`, and N = sequences; S counts the positions of all.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from klquant.checkpoint.config import KimiLinearConfig
from klquant.engine.decode import Stream, decode_layer, feed
from klquant.engine.state import DeviceState, StepRows, upload
from klquant.engine.weights import EngineLayer, FusedKDA, FusedMLA
from klquant.kernels.kda.borders import Borders
from klquant.kernels.kda.dispatch import prefill_inputs
from klquant.kernels.mla.dispatch import join, keys_values, mla_decode, read_latent, write_latent
from klquant.kernels.mla.pages import PAGE_SIZE, page_position
from klquant.kernels.norm.dispatch import add_rms_norm, gated_rms_norm
from klquant.model import mla as model_mla
from klquant.model.delta import gated_delta_rule
from klquant.model.weights import linear


@dataclass(frozen=True)
class Span:
    """Token ids of the sequence in a slot, from position `start` on."""

    ids: Sequence[int]
    slot: int
    start: int

    @property
    def stop(self) -> int:
        return self.start + len(self.ids)


def numbers(spans: Sequence[Span], rows: int) -> Tensor:
    """What makes `rows` rows out of spans, on the CPU, int64: borders [N + 1], slots [N], ends [N], then of each row
    its position and its span. Rows behind the spans are padding: position −1."""
    count_N = torch.tensor([len(span.ids) for span in spans])
    border = F.pad(count_N.cumsum(0), (1, 0))
    slot_N, stop_N = torch.tensor([[span.slot, span.stop] for span in spans]).T
    position = torch.cat([torch.arange(span.start, span.stop) for span in spans])
    span_of_row = torch.arange(len(spans)).repeat_interleave(count_N)
    missing = (0, rows - len(position))
    # The borders first: where a tensor begins is part of what Triton compiles for.
    return torch.cat([border, slot_N, stop_N, F.pad(position, missing, value=-1), F.pad(span_of_row, missing)])


@dataclass(frozen=True)
class ChunkRows:
    """Spans of different sequences, one behind the other, and padding.

    slots: of the sequences in a pool, a slice that makes a view where the host knows that there is one, else [N].
    length_N (with the span), position_S and at_S, where the positions' latents lie (both −1: padding), int64; table_NM
    int32. rows: first and end of each span; past: where the latents before it lie, or None where the host does not
    know.
    """

    borders: Borders
    slots: slice | Tensor
    slot_N: Tensor
    length_N: Tensor
    table_NM: Tensor
    position_S: Tensor
    at_S: Tensor
    rows: Sequence[tuple[int, int]]
    past: Sequence[Tensor] | None

    @classmethod
    def of(cls, state: DeviceState, spans: Sequence[Span]) -> "ChunkRows":
        """Without padding."""
        count, on_cpu = len(spans), numbers(spans, sum(len(span.ids) for span in spans))
        rows = cls.padded(state, upload(on_cpu, state.table.device), count)
        borders = replace(rows.borders, host=on_cpu[: count + 1])
        slots = rows.slot_N if count > 1 else slice(spans[0].slot, spans[0].slot + 1)
        past = [_first_positions(table_M, span.start) for table_M, span in zip(rows.table_NM, spans, strict=True)]
        return replace(rows, borders=borders, slots=slots, rows=borders.spans, past=past)

    @classmethod
    def padded(cls, state: DeviceState, on_device: Tensor, count: int = 1, behind: bool = False) -> "ChunkRows":
        """Of `numbers` on the device: the host knows how many rows there are, and nothing of what is in them. What a
        CUDA graph can be made of, for one span that begins its sequence, or one `behind` any others."""
        size = (len(on_device) - 3 * count - 1) // 2
        border, slot_N, stop_N, position_S, span_S = on_device.split([count + 1, count, count, size, size])
        table_NM = state.table[slot_N]
        at_S = page_position(table_NM[span_S, position_S // PAGE_SIZE], position_S)
        at_S = torch.where(position_S < 0, -1, at_S)
        past = None if behind else [at_S[:0]]
        return cls(Borders(None, border), slot_N, slot_N, stop_N, table_NM, position_S, at_S, [(0, size)], past)

    @property
    def has_padding(self) -> bool:
        return self.borders.host is None

    @property
    def copies(self) -> bool:
        """Whether what is taken out of a pool has to be put back."""
        return not isinstance(self.slots, slice)

    @cached_property
    def as_rows(self) -> StepRows:
        """Spans of one position as rows of a decode step."""
        return StepRows(self.slot_N.int(), self.slot_N, self.table_NM, self.length_N.int(), self.at_S)

    @cached_property
    def as_queries(self) -> tuple[Tensor, Tensor]:
        """Rows of one span as `mla_decode` takes them: page tables [S, M], and lengths [S], 0 of padding."""
        return self.table_NM.expand(len(self.position_S), -1), (self.position_S + 1).int()


def _first_positions(table_M: Tensor, count: int) -> Tensor:
    """Where the first positions of the sequence with these pages lie."""
    position_T = torch.arange(count, device=table_M.device)
    return page_position(table_M[position_T // PAGE_SIZE], position_T) if count else position_T


def prefill_layer(
    cfg: KimiLinearConfig, layer: int, w: EngineLayer, stream: Stream, state: DeviceState, chunk: ChunkRows
) -> Stream:
    """Layer `layer` for the positions of chunks: (h, delta) [S, C] → (h, delta). State is updated in place."""
    if len(chunk.at_S) == len(chunk.slot_N):
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
    pool, slots = state.kda[layer], chunk.slots
    borders = chunk.borders if chunk.copies else None
    f_a, g_a, b_SH = linear(x_SC, w.low).split([rank, rank, cfg.kda_heads], -1)
    tail = pool.conv[slots]
    q, k, v, beta = prefill_inputs(linear(x_SC, w.qkv)[None], b_SH[None], w.taps_FW, tail, borders)
    raw = F.linear(f_a, w.f_b)
    if chunk.has_padding:
        # With k = β = 0 and no decay padding leaves the state as it is.
        raw, borders = raw.masked_fill(chunk.at_S[:, None] < 0, float("-inf")), None
    raw = raw.unflatten(-1, heads)
    o, s = gated_delta_rule(q, k, v, raw[None], w.A_log, w.dt_bias, beta, pool.s[slots], borders)
    if chunk.copies:
        pool.conv[slots] = tail
    pool.s[slots] = s
    gate = F.linear(g_a, w.g_b).unflatten(-1, heads)
    return gated_rms_norm(o[0], gate, w.o_norm, cfg.rms_eps).flatten(-2)


def mla_mix(
    cfg: KimiLinearConfig, layer: int, w: FusedMLA, x_SC: Tensor, state: DeviceState, chunk: ChunkRows
) -> Tensor:
    """[S, C] → [S, H·v]. What attention sees of a token is what its page holds, rounding included.

    Where the host does not know how many latents lie before a span, each row attends to them by itself, as in a step of
    decoding: more work for long spans, and the same launches for every length.
    """
    pages = state.latent[layer]
    q, kv_a = linear(x_SC, w.q_kv_a).split([cfg.num_heads * cfg.qk_dim, cfg.latent_dim], -1)
    write_latent(kv_a, w.kv_a_norm, pages, chunk.at_S)
    q_SHK = q.unflatten(-1, (cfg.num_heads, cfg.qk_dim))
    if chunk.past is None:
        return mla_decode(q_SHK, w.kv_b, pages, *chunk.as_queries, cfg.qk_dim**-0.5)
    q_HSK = q_SHK.transpose(0, 1)

    def expand(at_T: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [H, T, ·] of the latents that lie there."""
        latent_TK, shared_TR = read_latent(pages, at_T, x_SC.dtype).split([cfg.kv_rank, cfg.qk_rope_dim], -1)
        return keys_values(F.linear(latent_TK, w.kv_b), shared_TR, cfg.num_heads, cfg.qk_nope_dim)

    own = expand(chunk.at_S)
    outs = []
    for (a, b), past_T in zip(chunk.rows, chunk.past, strict=True):
        q_HTK, *mine = (x[:, a:b] for x in (q_HSK, *own))
        outs.append(_attend(q_HTK, *mine, past_T, expand, cfg.v_dim).transpose(0, 1))
    return (torch.cat(outs) if len(outs) > 1 else outs[0]).flatten(1)


def _attend(
    q_HTK: Tensor, k_HTK: Tensor, v_HTV: Tensor, past_P: Tensor, expand: Callable[[Tensor], tuple[Tensor, Tensor]],
    v_dim: int,
) -> Tensor:  # fmt: skip
    """Each query to the keys up to its own, and to all latents that lie at `past`: [H, T, v] in q's dtype."""
    if not len(past_P):
        o = F.scaled_dot_product_attention(*(x[None] for x in (q_HTK, k_HTK, v_HTV)), is_causal=True)[0]
        return o[..., :v_dim]
    o_HTV, total_HT = _part(q_HTK, k_HTK, v_HTV, causal=True)
    blocks = past_P.split(model_mla.LATENT_BLOCK)
    for i, block in enumerate(blocks):
        past = _part(q_HTK, *expand(block))
        dtype = q_HTK.dtype if i == len(blocks) - 1 else total_HT.dtype
        o_HTV, total_HT = join(o_HTV, total_HT, *past, v_dim, dtype)
    return o_HTV


def _part(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> tuple[Tensor, Tensor]:
    """`part_attention` of one sequence."""
    o, log_sum = model_mla.part_attention(q[None], k[None], v[None], causal)
    return o[0], log_sum[0]
