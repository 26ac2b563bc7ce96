"""A decode step of KDA in one kernel: a program has one head of one sequence, its whole state in registers.

The state is read and written once, 64 KiB each way of the 48B's heads; beside it a program reads its head's rows of the
two gate projections, as many bytes, which a batch shares in the L2 cache. Everything is loaded before anything is
summed, so that a step is one trip to memory and a chain of four sums.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from klquant.kernels.kda.weights import KDADecode
from klquant.kernels.norm.reference import L2_EPS


@triton.jit
def _columns(rows, channel, COUNT: tl.constexpr):
    """The COUNT values that each channel has in `rows` [channels, COUNT], as a tuple of [D]."""
    columns = ()
    for i in tl.static_range(COUNT):
        columns = columns + (tl.load(rows + channel * COUNT + i),)  # noqa: RUF005 (Triton has no stars)
    return columns


@triton.jit
def _mix(window, taps, W: tl.constexpr, DTYPE: tl.constexpr):
    """silu of the convolution of the last W inputs, oldest first, rounded as an activation is."""
    y = window[0].to(tl.float32) * taps[0].to(tl.float32)
    for i in tl.static_range(1, W):
        y += window[i].to(tl.float32) * taps[i].to(tl.float32)
    return (y * tl.sigmoid(y)).to(DTYPE).to(tl.float32)


@triton.jit
def _shift(tail, window, channel, W: tl.constexpr):
    """Store all but the oldest input of the window."""
    for i in tl.static_range(W - 1):
        tl.store(tail + channel * (W - 1) + i, window[i + 1])


@triton.jit
def _project(rows, x, DTYPE: tl.constexpr):
    """rows [D, R] times x [R, 8], of which column 0 counts, rounded as an activation is."""
    y = tl.dot(rows, x)
    first = tl.arange(0, 8)[None, :] == 0
    return tl.sum(tl.where(first, y, 0.0), 1).to(DTYPE).to(tl.float32)


@triton.jit
def _detach(x):
    """x [D] as it is. Triton hands the layout of a product on to all that its result meets; a gather ends that, so that
    128 values change their place and not the state."""
    return tl.gather(x, tl.arange(0, x.shape[0]), 0)


@triton.jit
def _softplus(x):
    # log(1 + e) · e / ((1 + e) − 1): exact where 1 + e rounds e away.
    e = tl.exp(x)
    u = 1.0 + e
    return tl.where(x > 20.0, x, tl.where(u == 1.0, e, tl.log(u) * e / (u - 1.0)))


@triton.jit
def kda_decode_kernel(
    qkv, qkv_stride, low, low_stride, taps, A_log, dt_bias, f_b, g_b, o_norm, conv_pool, s_pool, slot, out, eps, l2_eps,
    H: tl.constexpr, D: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """out [B, H·D]; grid (heads, sequences)."""
    DTYPE: tl.constexpr = qkv.dtype.element_ty
    F: tl.constexpr = H * D
    head = tl.program_id(0)
    row = tl.program_id(1)
    d = tl.arange(0, D)
    q_at = head * D + d
    k_at, v_at = q_at + F, q_at + 2 * F
    here = tl.load(slot + row).to(tl.int64)
    if here >= 0:
        s_at = s_pool + (here * H + head) * D * D + d[:, None] * D + d[None, :]
        s = tl.load(s_at)
        r = tl.arange(0, R)
        x = low + row.to(tl.int64) * low_stride
        # Four at a time, as the state's FP32 values are: what is fetched alike lies alike, and nothing has to move.
        rows_at = tl.max_contiguous(q_at[:, None] * R + r[None, :], [1, 4])
        f_rows = tl.load(f_b + rows_at)
        g_rows = tl.load(g_b + rows_at)
        x_at = x + r[:, None] + tl.arange(0, 8)[None, :] * 0
        first = tl.arange(0, 8)[None, :] == 0
        f_a = tl.load(x_at, mask=first, other=0.0)
        g_a = tl.load(x_at + R, mask=first, other=0.0)
        beta = tl.sigmoid(tl.load(x + 2 * R + head).to(tl.float32))
        rate = tl.exp(tl.load(A_log + head))
        bias = tl.load(dt_bias + q_at)
        norm = tl.load(o_norm + d).to(tl.float32)
        tail = conv_pool + here * (3 * F * (W - 1))
        inputs = qkv + row.to(tl.int64) * qkv_stride
        q_window = _columns(tail, q_at, W - 1) + (tl.load(inputs + q_at),)  # noqa: RUF005
        k_window = _columns(tail, k_at, W - 1) + (tl.load(inputs + k_at),)  # noqa: RUF005
        v_window = _columns(tail, v_at, W - 1) + (tl.load(inputs + v_at),)  # noqa: RUF005
        q_taps = _columns(taps, q_at, W)
        k_taps = _columns(taps, k_at, W)
        v_taps = _columns(taps, v_at, W)

        q = _mix(q_window, q_taps, W, DTYPE)
        k = _mix(k_window, k_taps, W, DTYPE)
        v = _mix(v_window, v_taps, W, DTYPE)
        decay = _detach(tl.exp(-rate * _softplus(_project(f_rows, f_a, DTYPE) + bias)))
        gate = _project(g_rows, g_a, DTYPE)
        q = _detach(q / tl.sqrt(tl.sum(q * q, 0) + l2_eps) * D**-0.5)
        k = _detach(k / tl.sqrt(tl.sum(k * k, 0) + l2_eps))

        s *= decay[:, None]
        # Sₜᵀ q = (decayed S)ᵀ q + (k · q) · update: both sums over the state at once.
        seen = tl.sum(s * k[:, None], 0)
        asked = tl.sum(s * q[:, None], 0)
        update = beta * (v - seen)
        # All have read by now what is overwritten here.
        tl.debug_barrier()
        tl.store(s_at, s + k[:, None] * update[None, :])
        _shift(tail, q_window, q_at, W)
        _shift(tail, k_window, k_at, W)
        _shift(tail, v_window, v_at, W)

        o = asked + tl.sum(q * k, 0) * update
        o = o * tl.rsqrt(tl.sum(o * o, 0) / D + eps) * norm * tl.sigmoid(gate)
        tl.store(out + row.to(tl.int64) * F + q_at, o.to(DTYPE))
    else:
        tl.store(out + row.to(tl.int64) * F + q_at, tl.zeros([D], DTYPE))


def kda_decode(
    qkv: Tensor, low: Tensor, w: KDADecode, conv_pool: Tensor, s_pool: Tensor, slot_B: Tensor, eps: float
) -> Tensor:
    """One launch. D and R are powers of two."""
    # 128 registers let two programs of eight warps, one of which loads or stores, share a multiprocessor.
    _, heads, dim, _ = s_pool.shape
    taps = w.taps.shape[1]
    out = torch.empty(len(qkv), heads * dim, dtype=qkv.dtype, device=qkv.device)
    kda_decode_kernel[(heads, len(qkv))](
        qkv, qkv.stride(0), low, low.stride(0), w.taps, w.A_log, w.dt_bias, w.f_b, w.g_b, w.o_norm, conv_pool, s_pool,
        slot_B, out, eps, L2_EPS, H=heads, D=dim, R=w.f_b.shape[1], W=taps,
        num_warps=min(8, max(1, dim * dim // 2048)), maxnreg=128,
    )  # fmt: skip
    return out
