"""Temperature and noise on a row of logits in one pass. As plain operations they would be thirty passes over int64."""

import torch
import triton
import triton.language as tl
from torch import Tensor

DRAW_BLOCK = 2048


@triton.jit
def mix(x):
    """MurmurHash3's last step, on uint32."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def minus_log1m(u):
    """−log(1 − u) for 0 < u < 1. For small u by its series, because 1 − u rounds."""
    series = u * (1.0 + u * (0.5 + u * (1.0 / 3.0 + u * 0.25)))
    return tl.where(u < 0.01, series, -tl.log(1.0 - u))


@triton.jit
def noisy(logit, t, seed, position, name):
    """logit / t + the noise of the tokens `name`, FP32; at t = 0 the logit."""
    key = mix(mix(mix(position.to(tl.uint32)) ^ (seed >> 32).to(tl.uint32)) ^ seed.to(tl.uint32))
    x = mix((name.to(tl.uint32) * 0x9E3779B1) ^ mix(key))
    x = mix(x + mix(key + 0x9E3779B1))
    u = tl.minimum((x.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 1.0 - 5.9604644775390625e-08)
    noise = -tl.log(minus_log1m(u))
    return tl.where(t > 0, logit / tl.where(t > 0, t, 1.0) + noise, logit)


@triton.jit
def ordered(x):
    """int32 in the order of FP32 x; both zeros are one."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def best_kernel(z, z_stride, temperature, seed, slot, position, best, vocab, BLOCK: tl.constexpr):
    """best [B, blocks]: the order of the block's largest value, 32 bits, above how far from the end its column is.

    Grid (rows, blocks of the vocabulary).
    """
    row = tl.program_id(0).to(tl.int64)
    v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    logit = tl.load(z + row * z_stride + v, mask=v < vocab, other=float("-inf")).to(tl.float32)
    drawn = logit
    if temperature is not None:
        here = tl.load(slot + row)
        drawn = noisy(logit, tl.load(temperature + here), tl.load(seed + here), tl.load(position + row), v)
    order = tl.where(logit < float("inf"), ordered(drawn), 0x7FFFFFFF)
    key = (order.to(tl.int64) << 32) | (0x7FFFFFFF - v)
    tl.store(best + row * tl.num_programs(1) + tl.program_id(1), tl.max(key, 0))


@triton.jit
def token_kernel(best, token, seen, slot, vocab, blocks, BLOCK: tl.constexpr):
    """token [B], and that the row's slot has `seen` [N, vocab] it, if there is such a table. One program a row."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    key = tl.max(tl.load(best + row * blocks + i, mask=i < blocks, other=-0x8000000000000000), 0)
    order = key >> 32
    # More than −∞, and a number.
    good = (order > -0x7F800001) & (order < 0x7FFFFFFF)
    found = 0x7FFFFFFF - (key & 0x7FFFFFFF)
    tl.store(token + row, tl.where(good, found, -1))
    if seen is not None:
        tl.store(seen + tl.load(slot + row).to(tl.int64) * vocab + found, 1, mask=good)


def draw(
    z_BV: Tensor, temperature_N: Tensor | None, seed_N: Tensor, slot_B: Tensor, position_B: Tensor
) -> Tensor:  # fmt: skip
    """`klquant.kernels.sample.dispatch.draw`; rows of z may be strided."""
    rows, vocab = z_BV.shape
    blocks = triton.cdiv(vocab, DRAW_BLOCK)
    best = torch.empty(rows, blocks, dtype=torch.int64, device=z_BV.device)
    token = torch.empty(rows, dtype=torch.int64, device=z_BV.device)
    best_kernel[(rows, blocks)](
        z_BV, z_BV.stride(0), temperature_N, seed_N, slot_B, position_B, best, vocab, BLOCK=DRAW_BLOCK, num_warps=4
    )
    token_kernel[(rows,)](best, token, None, None, vocab, blocks, BLOCK=triton.next_power_of_2(blocks), num_warps=1)
    return token
