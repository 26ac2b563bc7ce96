"""Around a chunk's attention: latents out of their pages, keys and values side by side, two attentions as one.

Each is one launch of programs that have some tokens, of one head where heads differ.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from klquant.kernels.mla.pages import LatentPages
from klquant.kernels.mla.words import e4m3

TOKENS = 16


@triton.jit(do_not_specialize=["count"])
def read_latent_kernel(
    data, scale, place, out, count, L: tl.constexpr, BLOCK: tl.constexpr, BT: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    """out [count, L]; grid (tiles of BT tokens,)."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    l = tl.arange(0, BLOCK)
    exists = t < count
    inside = exists[:, None] & (l < L)[None, :]
    at = tl.load(place + t, mask=exists, other=-1)
    x = tl.load(data + at[:, None] * L + l[None, :], mask=inside & (at >= 0)[:, None], other=0)
    if FORMAT != "plain":
        value = e4m3(x.to(tl.int32)) if FORMAT == "fp8" else x.to(tl.float32)
        x = value * tl.load(scale + at, mask=at >= 0, other=0.0)[:, None]
    tl.store(out + t[:, None].to(tl.int64) * L + l[None, :], x.to(out.dtype.element_ty), mask=inside)


def read_latent(pages: LatentPages, at_T: Tensor, dtype: torch.dtype) -> Tensor:
    """One launch."""
    width, count, coded = pages.data.shape[-1], len(at_T), pages.scale is not None
    out = torch.empty(count, width, dtype=dtype, device=at_T.device)
    read_latent_kernel[(triton.cdiv(count, TOKENS),)](
        pages.data.view(torch.int8) if coded else pages.data, pages.scale, at_T, out, count,
        L=width, BLOCK=triton.next_power_of_2(width), BT=TOKENS, FORMAT=pages.format, num_warps=8,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["count"])
def keys_values_kernel(
    kv, shared, shared_stride, keys, values, count, H: tl.constexpr, NOPE: tl.constexpr, ROPE: tl.constexpr,
    V: tl.constexpr, WIDTH: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """keys [T, H, NOPE + ROPE], values [T, H, WIDTH], zeros behind the first V; grid (heads, tiles of BT tokens)."""
    head = tl.program_id(0)
    t = (tl.program_id(1) * BT + tl.arange(0, BT))[:, None].to(tl.int64)
    exists = t < count
    row = t * H + head
    n, r, w = tl.arange(0, BN)[None, :], tl.arange(0, BR)[None, :], tl.arange(0, BV)[None, :]
    key = tl.load(kv + row * (NOPE + V) + n, mask=exists & (n < NOPE), other=0.0)
    tl.store(keys + row * (NOPE + ROPE) + n, key, mask=exists & (n < NOPE))
    key = tl.load(shared + t * shared_stride + r, mask=exists & (r < ROPE), other=0.0)
    tl.store(keys + row * (NOPE + ROPE) + NOPE + r, key, mask=exists & (r < ROPE))
    value = tl.load(kv + row * (NOPE + V) + NOPE + w, mask=exists & (w < V), other=0.0)
    tl.store(values + row * WIDTH + w, value, mask=exists & (w < WIDTH))


def keys_values(kv_TF: Tensor, shared_TR: Tensor, heads: int, nope: int) -> tuple[Tensor, Tensor]:
    """One launch."""
    count, rope, v = len(kv_TF), shared_TR.shape[1], kv_TF.shape[1] // heads - nope
    width = max(v, nope + rope)
    keys = torch.empty(count, heads, nope + rope, dtype=kv_TF.dtype, device=kv_TF.device)
    values = torch.empty(count, heads, width, dtype=kv_TF.dtype, device=kv_TF.device)
    blocks = {name: triton.next_power_of_2(n) for name, n in (("BN", nope), ("BR", rope), ("BV", width))}
    keys_values_kernel[(heads, triton.cdiv(count, TOKENS))](
        kv_TF, shared_TR, shared_TR.stride(0), keys, values, count,
        H=heads, NOPE=nope, ROPE=rope, V=v, WIDTH=width, **blocks, BT=TOKENS, num_warps=4,
    )  # fmt: skip
    return keys.transpose(0, 1), values.transpose(0, 1)


@triton.jit(do_not_specialize=["count"])
def join_kernel(
    a, a_head, a_row, a_sum, b, b_head, b_row, b_sum, out, total, count,
    H: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """out [S, H, V], total [H, S]; grid (heads, tiles of BT positions)."""
    head = tl.program_id(0)
    s = tl.program_id(1) * BT + tl.arange(0, BT)
    c = tl.arange(0, BLOCK)
    exists = s < count
    inside = exists[:, None] & (c < V)[None, :]
    at = head * count + s
    x = tl.load(a_sum + at, mask=exists, other=0.0)
    y = tl.load(b_sum + at, mask=exists, other=0.0)
    most = tl.maximum(x, y)
    x, y = tl.exp(x - most), tl.exp(y - most)
    row = s[:, None].to(tl.int64)
    p = tl.load(a + head * a_head + row * a_row + c[None, :], mask=inside, other=0.0).to(tl.float32)
    q = tl.load(b + head * b_head + row * b_row + c[None, :], mask=inside, other=0.0).to(tl.float32)
    o = (p * x[:, None] + q * y[:, None]) / (x + y)[:, None]
    tl.store(out + (row * H + head) * V + c[None, :], o.to(out.dtype.element_ty), mask=inside)
    tl.store(total + at, most + tl.log(x + y), mask=exists)


def join(
    a: Tensor, a_sum: Tensor, b: Tensor, b_sum: Tensor, v_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One launch."""
    heads, count, _ = a.shape
    out = torch.empty(count, heads, v_dim, dtype=dtype, device=a.device)
    total = torch.empty(heads, count, dtype=torch.float32, device=a.device)
    join_kernel[(heads, triton.cdiv(count, TOKENS))](
        a, a.stride(0), a.stride(1), a_sum.contiguous(), b, b.stride(0), b.stride(1), b_sum.contiguous(), out, total,
        count, H=heads, V=v_dim, BLOCK=triton.next_power_of_2(v_dim), BT=TOKENS, num_warps=4,
    )  # fmt: skip
    return out.transpose(0, 1), total
