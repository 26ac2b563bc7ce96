"""Temperature and noise on a row of logits in one pass. As plain operations they would be thirty passes over int64."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


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
def perturb_kernel(
    z, z_stride, temperature, seed, position, token, out, vocab, SORTED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Grid (rows, blocks of the vocabulary). SORTED: `token` names the tokens of the columns."""
    row = tl.program_id(0).to(tl.int64)
    v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = v < vocab
    t = tl.load(temperature + row)
    logit = tl.load(z + row * z_stride + v, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(seed + row)
    key = mix(mix(mix(tl.load(position + row).to(tl.uint32)) ^ (s >> 32).to(tl.uint32)) ^ s.to(tl.uint32))
    name = v
    if SORTED:
        name = tl.load(token + row * vocab + v, mask=inside, other=0)
    x = mix((name.to(tl.uint32) * 0x9E3779B1) ^ mix(key))
    x = mix(x + mix(key + 0x9E3779B1))
    u = tl.minimum((x.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 1.0 - 5.9604644775390625e-08)
    noise = -tl.log(minus_log1m(u))
    drawn = logit / tl.where(t > 0, t, 1.0) + noise
    tl.store(out + row * vocab + v, tl.where(t > 0, drawn, logit), mask=inside)


def perturb(
    z_BV: Tensor, temperature_B: Tensor, seed_B: Tensor, position_B: Tensor, token_BV: Tensor | None
) -> Tensor:  # fmt: skip
    rows, vocab = z_BV.shape
    out = torch.empty(rows, vocab, dtype=torch.float32, device=z_BV.device)
    perturb_kernel[(rows, triton.cdiv(vocab, BLOCK))](
        z_BV, z_BV.stride(0), temperature_B, seed_B, position_B, token_BV, out, vocab,
        SORTED=token_BV is not None, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return out
