"""What KDA's delta rule reads of a chunk, in one kernel: a program has some positions of one head's q, k or v."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from klquant.kernels.kda.borders import Borders
from klquant.kernels.kda.inputs import columns
from klquant.kernels.norm.reference import L2_EPS

POSITIONS = 32


@triton.jit
def _rows(rows, channel, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """`columns` in FP32 with one load a channel: every program needs the taps, only a head's first its tail."""
    j = tl.arange(0, BLOCK)[None, :]
    values = tl.load(rows + channel[:, None] * COUNT + j, mask=j < COUNT, other=0.0).to(tl.float32)
    found = ()
    for i in tl.static_range(COUNT):
        found = found + (tl.sum(tl.where(j == i, values, 0.0), 1),)  # noqa: RUF005
    return found


@triton.jit
def _last(x, x_stride, tail, channel, count, W: tl.constexpr):
    """The last W − 1 inputs of `channel`, oldest first, as a tuple of [D]; those before the chunk are the tail's."""
    found = ()
    for i in tl.static_range(W - 1):
        at = count - (W - 1) + i
        new = tl.load(x + tl.maximum(at, 0).to(tl.int64) * x_stride + channel, mask=(channel >= 0) & (at >= 0))
        old = tl.load(tail + channel * (W - 1) + at + (W - 1), mask=(channel >= 0) & (at < 0))
        found = found + (tl.where(at >= 0, new, old),)  # noqa: RUF005
    return found


@triton.jit(do_not_specialize=["count"])
def prefill_inputs_kernel(
    qkv, qkv_stride, b, b_stride, taps, tail, borders, out, beta, count, eps,
    H: tl.constexpr, D: tl.constexpr, W: tl.constexpr, BW: tl.constexpr, BS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """out [3, B, S, H·D]: q, k, v; β [B, S, H]; grid (3·heads, tiles of BS positions, sequences). count: positions of a
    sequence, or with borders of all. PADDED: those behind the only sequence become 0.

    Of all programs only a head's first in a sequence reads the head's tail, and having read it puts the new one there.
    """
    DTYPE: tl.constexpr = qkv.dtype.element_ty
    head = tl.program_id(0)
    d = tl.arange(0, D)
    channel = head * D + d
    s = tl.program_id(1) * BS + tl.arange(0, BS)
    if borders is None:
        first, total = tl.program_id(2).to(tl.int64) * count, tl.num_programs(2).to(tl.int64) * count
    else:
        first, total = tl.load(borders + tl.program_id(2)), count.to(tl.int64)
        count = (tl.load(borders + tl.program_id(2) + 1) - first).to(tl.int32)
    exists = s < count
    x_rows = qkv + first * qkv_stride
    tap = _rows(taps, channel, W, BW)
    y = tl.zeros([BS, D], tl.float32)
    for i in tl.static_range(W):
        at = s + (i - (W - 1))
        rows = x_rows + at[:, None].to(tl.int64) * qkv_stride + channel[None, :]
        x = tl.load(rows, mask=((at >= 0) & exists)[:, None], other=0.0).to(tl.float32)
        y += x * tap[i][None, :]
    if tail is not None:  # noqa: SIM102 (one is known when compiling, the other is not)
        if tl.program_id(1) == 0:
            own = tail + tl.program_id(2).to(tl.int64) * (3 * H * D * (W - 1))
            past = columns(own, channel, W - 1)
            new = _last(x_rows, qkv_stride, own, channel, count, W)
            for i in tl.static_range(W - 1):
                for j in tl.static_range(i, W - 1):
                    # Position j − i sees input j of the tail through tap i.
                    y += tl.where((s == j - i)[:, None], (past[j].to(tl.float32) * tap[i])[None, :], 0.0)
            # All have read by now what is overwritten here.
            tl.debug_barrier()
            for i in tl.static_range(W - 1):
                tl.store(own + channel * (W - 1) + i, new[i])
    y = (y * tl.sigmoid(y)).to(DTYPE)
    keeps = exists
    if PADDED:
        # A sequence shorter than the taps has a tail that reaches beyond its end.
        y, keeps = tl.where(exists[:, None], y, 0.0).to(DTYPE), s < total
    part = head // H
    head = head % H
    if part < 2:
        x = y.to(tl.float32)
        y = (x / tl.sqrt(tl.sum(x * x, 1) + eps)[:, None]).to(DTYPE)
    to = (part * total + first + s)[:, None] * (H * D) + (head * D + d)[None, :]
    tl.store(out + to, y, mask=keeps[:, None])
    if part == 2:
        logit = tl.load(b + (first + s) * b_stride + head, mask=exists, other=float("-inf")).to(tl.float32)
        tl.store(beta + (first + s) * H + head, tl.sigmoid(logit), mask=keeps)


def prefill_inputs(
    qkv_BSF: Tensor, b_BSH: Tensor, taps_FW: Tensor, tail_BFW: Tensor | None, borders: Borders | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """One launch. D is a power of two."""
    batch, count, heads = b_BSH.shape
    dim = qkv_BSF.shape[-1] // (3 * heads)
    qkv_TF, b_TH = qkv_BSF.flatten(0, 1), b_BSH.flatten(0, 1)
    out = torch.empty(3, batch, count, heads, dim, dtype=qkv_TF.dtype, device=qkv_TF.device)
    beta = torch.empty(batch, count, heads, dtype=torch.float32, device=qkv_TF.device)
    padded = borders is not None and borders.host is None
    lengths = [end - start for start, end in borders.spans] if borders and not padded else [count] * batch
    prefill_inputs_kernel[(3 * heads, triton.cdiv(max(lengths), POSITIONS), len(lengths))](
        qkv_TF, qkv_TF.stride(0), b_TH, b_TH.stride(0), taps_FW, tail_BFW, borders.device if borders else None, out,
        beta, count, L2_EPS,
        H=heads, D=dim, W=taps_FW.shape[1], BW=triton.next_power_of_2(taps_FW.shape[1]), BS=POSITIONS,
        PADDED=padded, num_warps=4,
    )  # fmt: skip
    return *out.unbind(), beta
