"""A decode step of KDA in two kernels: what the states meet, then the states.

A state is read and written once, 64 KiB each way of a head of the 48B's, and lies in registers in between. The small
work before it, whose chain is long, has programs of its own (`klquant.kernels.kda.inputs`), so that the programs of the
states are short and many.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from klquant.kernels.kda.inputs import DECAY, GATE, KINDS, VALUE, K, Q, kda_inputs_kernel
from klquant.kernels.kda.tiles import Tile
from klquant.kernels.kda.weights import KDADecode
from klquant.kernels.norm.reference import L2_EPS

# Sequences and outputs of a program that projects for the gates.
BT, BD = 8, 64


@triton.jit
def _add(a, b, c, d):
    """(a, b) + (c, d)."""
    return a + c, b + d


@triton.jit
def kda_state_kernel(
    mid, product, turn, beta, beta_stride, s_pool, slot, wide, out, eps,
    H: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr, KINDS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """out [B, H·D] and the states at `slot`; grid (heads · SPLITS, sequences), a program has D / SPLITS columns.

    Outputs wait in `wide` [B, H·D] FP32 until the last program of a head, who finds `turn` at SPLITS − 1, normalizes
    them. SPLITS is 2 or more.
    """
    DTYPE: tl.constexpr = out.dtype.element_ty
    BV: tl.constexpr = D // SPLITS
    head = tl.program_id(0) // SPLITS
    part = tl.program_id(0) % SPLITS
    row = tl.program_id(1)
    d = tl.arange(0, D)
    v = part * BV + tl.arange(0, BV)
    here = tl.load(slot + row).to(tl.int64)
    to = out + (row.to(tl.int64) * H + head) * D
    if here >= 0:
        s_at = s_pool + (here * H + head) * (D * D) + d[:, None] * D + v[None, :]
        s = tl.load(s_at)
        step = tl.sigmoid(tl.load(beta + row.to(tl.int64) * beta_stride + head).to(tl.float32))
        if EARLY:
            gdc_wait()
        else:
            # Or the compiler would ask for a part of the state only when the parts before it are there.
            tl.debug_barrier()
        # All of it is on its way before any of it changes its place.
        at = mid + (row * H + head) * (KINDS * D)
        decay = tl.load(at + DECAY * D + d)
        k = tl.load(at + K * D + d)
        q = tl.load(at + Q * D + d)
        value = tl.load(at + VALUE * D + v)
        along = tl.load(product + row * H + head)
        gate = tl.load(at + GATE * D + d)

        s *= decay[:, None]
        # Sₜᵀ q = (decayed S)ᵀ q + (k · q) · update: both sums over the state at once.
        seen, asked = tl.reduce((s * k[:, None], s * q[:, None]), 0, _add)
        update = step * (value - seen)
        o = asked + along * update
        s += k[:, None] * update[None, :]
        # Every program writes its own columns and only the last reads: the same bits whoever is last.
        whole = wide + (row * H + head) * D
        tl.store(whole + v, o)
        tl.debug_barrier()
        before = tl.atomic_add(turn + row * H + head, 1, sem="acq_rel")
        # The atomic waits for what was stored before it.
        tl.store(s_at, s)
        if before == SPLITS - 1:
            all = tl.load(whole + d, cache_modifier=".cg")
            tl.store(to + d, (all * tl.rsqrt(tl.sum(all * all, 0) / D + eps) * gate).to(DTYPE))
    else:
        tl.store(to + v, tl.zeros([BV], DTYPE))


def kda_decode(
    qkv: Tensor, low: Tensor, w: KDADecode, conv_pool: Tensor, s_pool: Tensor, slot_B: Tensor, eps: float,
    tile: Tile,
) -> Tensor:  # fmt: skip
    """Two launches. D and R are powers of two."""
    (_, heads, dim, _), batch = s_pool.shape, len(qkv)
    width, rank, part = heads * dim, w.f_b.shape[1], min(BD, dim)
    out = torch.empty(batch, width, dtype=qkv.dtype, device=qkv.device)
    wide, mid, product = (
        torch.empty(batch, size, dtype=torch.float32, device=qkv.device) for size in (width, KINDS * width, heads)
    )
    turn = torch.empty(batch, heads, dtype=torch.int32, device=qkv.device)
    programs = 2 * batch + triton.cdiv(batch, BT) * 2 * (dim // part)
    kda_inputs_kernel[(heads, programs)](
        qkv, qkv.stride(0), low, low.stride(0), w.taps, w.A_log, w.dt_bias, w.f_b, w.g_b, w.o_norm, conv_pool, slot_B,
        mid, product, turn, batch, L2_EPS, H=heads, D=dim, R=rank, W=w.taps.shape[1], BD=part, BT=BT, KINDS=KINDS,
        EARLY=tile.early, num_warps=2,
    )  # fmt: skip
    early = {"launch_pdl": True} if tile.early else {}
    kda_state_kernel[(heads * tile.splits, batch)](
        mid, product, turn, low[:, 2 * rank :], low.stride(0), s_pool, slot_B, wide, out, eps, H=heads, D=dim,
        SPLITS=tile.splits, KINDS=KINDS, EARLY=tile.early, num_warps=tile.warps, **early,
    )  # fmt: skip
    return out
