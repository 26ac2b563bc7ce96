"""What a head's state meets in a decode step: its query, key, value, decay and output gate, FP32.

A program does one of these for one head, so that many of them share what is little work but a long chain.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

# What `mid` holds of a head, each D values. The gate is sigmoid times the weight of the norm.
Q, K, VALUE, DECAY, GATE = (tl.constexpr(i) for i in range(5))
KINDS = 5


@triton.jit
def columns(rows, channel, COUNT: tl.constexpr):
    """The COUNT values that each channel has in `rows` [channels, COUNT], as a tuple of [D]."""
    found = ()
    for i in tl.static_range(COUNT):
        found = found + (tl.load(rows + channel * COUNT + i),)  # noqa: RUF005 (Triton has no stars)
    return found


@triton.jit
def _mix(window, taps, W: tl.constexpr):
    """silu of the convolution of the last W inputs, oldest first: FP32, for it stays in registers."""
    y = window[0].to(tl.float32) * taps[0].to(tl.float32)
    for i in tl.static_range(1, W):
        y += window[i].to(tl.float32) * taps[i].to(tl.float32)
    return y * tl.sigmoid(y)


@triton.jit
def _shift(tail, window, channel, W: tl.constexpr):
    """Store all but the oldest input of the window."""
    for i in tl.static_range(W - 1):
        tl.store(tail + channel * (W - 1) + i, window[i + 1])


@triton.jit
def _softplus(x):
    # log(1 + e) · e / ((1 + e) − 1): exact where 1 + e rounds e away.
    e = tl.exp(x)
    u = 1.0 + e
    return tl.where(x > 20.0, x, tl.where(u == 1.0, e, tl.log(u) * e / (u - 1.0)))


@triton.jit
def kda_inputs_kernel(
    qkv, qkv_stride, low, low_stride, taps, A_log, dt_bias, f_b, g_b, o_norm, conv_pool, slot, mid, product, turn,
    batch, l2_eps,
    H: tl.constexpr, D: tl.constexpr, R: tl.constexpr, W: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr,
    KINDS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """mid [B, H, KINDS, D]; product [B, H] = q · k; turn [B, H] = 0.

    Grid (heads, programs): two for each sequence, one has q and k and the other v, then for each BT sequences
    D / BD for the decay and as many for the gate.
    """
    F: tl.constexpr = H * D
    if EARLY:
        gdc_launch_dependents()
    head = tl.program_id(0)
    program = tl.program_id(1)
    if program < 2 * batch:
        row = program // 2
        here = tl.load(slot + row).to(tl.int64)
        if here >= 0:
            d = tl.arange(0, D)
            channel = head * D + d
            tail = conv_pool + here * (3 * F * (W - 1))
            inputs = qkv + row.to(tl.int64) * qkv_stride
            to = mid + (row * H + head) * (KINDS * D) + d
            # Everything is on its way before anything is waited for.
            if program % 2 == 0:
                q_window = columns(tail, channel, W - 1) + (tl.load(inputs + channel),)  # noqa: RUF005
                k_window = columns(tail, channel + F, W - 1) + (tl.load(inputs + channel + F),)  # noqa: RUF005
                q_taps = columns(taps, channel, W)
                k_taps = columns(taps, channel + F, W)
                q = _mix(q_window, q_taps, W)
                k = _mix(k_window, k_taps, W)
                q = q / tl.sqrt(tl.sum(q * q, 0) + l2_eps) * D**-0.5
                k = k / tl.sqrt(tl.sum(k * k, 0) + l2_eps)
                tl.store(to + Q * D, q)
                tl.store(to + K * D, k)
                tl.store(product + row * H + head, tl.sum(q * k, 0))
                # All have read by now what is overwritten here.
                tl.debug_barrier()
                _shift(tail, q_window, channel, W)
                _shift(tail, k_window, channel + F, W)
            else:
                v_window = columns(tail, channel + 2 * F, W - 1) + (tl.load(inputs + channel + 2 * F),)  # noqa: RUF005
                v_taps = columns(taps, channel + 2 * F, W)
                tl.store(to + VALUE * D, _mix(v_window, v_taps, W))
                tl.store(turn + row * H + head, 0)
                tl.debug_barrier()
                _shift(tail, v_window, channel + 2 * F, W)
    else:
        PARTS: tl.constexpr = D // BD
        which = program - 2 * batch
        is_gate = which % 2
        n = head * D + which // 2 % PARTS * BD + tl.arange(0, BD)
        rows = (which // (2 * PARTS) * BT + tl.arange(0, BT))[None, :]
        inside = rows < batch
        r = tl.arange(0, R)
        bias, rate = tl.load(dt_bias + n), tl.exp(tl.load(A_log + head))
        norm = tl.load(o_norm + n - head * D).to(tl.float32)
        weight = g_b if is_gate else f_b
        a = tl.load(weight + n[:, None] * R + r[None, :])
        x = tl.load(low + rows.to(tl.int64) * low_stride + is_gate * R + r[:, None], mask=inside, other=0.0)
        y = tl.dot(a, x)
        at = mid + (rows * H + head) * (KINDS * D) + (n - head * D)[:, None]
        if is_gate:
            tl.store(at + GATE * D, tl.sigmoid(y) * norm[:, None], mask=inside)
        else:
            tl.store(at + DECAY * D, tl.exp(-rate * _softplus(y + bias[:, None])), mask=inside)
