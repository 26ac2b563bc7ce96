"""Multi-head latent attention without position encoding: keys and values are expanded from one latent a token."""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from klquant.checkpoint.config import KimiLinearConfig
from klquant.kernels.mla import dispatch, reference
from klquant.model import fused
from klquant.model.norm import LATENT_EPS, rms_norm, widen
from klquant.model.weights import MLAWeights, linear

# Latents before a chunk that are expanded to keys and values at a time: bounds memory at any context.
LATENT_BLOCK = 4096


class Latents(Protocol):
    """Latents of the first `length` positions; how they are kept is the cache's own business."""

    @property
    def length(self) -> int: ...

    def append(self, kv_a_BSL: Tensor, norm: Tensor) -> None:
        """Keep what kv_a_proj made of the next positions; norm [kv_rank] is the latent's."""

    def read(self, start: int, stop: int) -> Tensor:
        """Latents [B, stop − start, L] as they are kept."""


@dataclass
class LatentCache:
    """Latents of the tokens seen so far: [B, room, L], of which `length` positions are filled.

    L = the normed latent ‖ the key part shared by all heads. The buffer grows by doubling.
    """

    buffer_BSL: Tensor
    length: int = 0

    @classmethod
    def empty(cls, cfg: KimiLinearConfig, batch: int, dtype: torch.dtype, device: torch.device | str) -> "LatentCache":
        return cls(torch.empty(batch, 0, cfg.latent_dim, dtype=dtype, device=device))

    def append(self, kv_a_BSL: Tensor, norm: Tensor) -> None:
        end = self.length + kv_a_BSL.shape[1]
        if end > self.buffer_BSL.shape[1]:
            B, _, L = kv_a_BSL.shape
            grown = self.buffer_BSL.new_empty(B, max(end, 2 * self.length), L)
            grown[:, : self.length] = self.buffer_BSL[:, : self.length]
            self.buffer_BSL = grown
        self.buffer_BSL[:, self.length : end] = normed_latent(kv_a_BSL, norm)
        self.length = end

    def read(self, start: int, stop: int) -> Tensor:
        return self.buffer_BSL[:, start:stop]


def normed_latent(kv_a_BSL: Tensor, norm: Tensor) -> Tensor:
    """What kv_a_proj makes → what attention reads: the latent normed, the shared key part as it is."""
    rank = len(norm)
    return torch.cat([rms_norm(kv_a_BSL[..., :rank], norm, LATENT_EPS), kv_a_BSL[..., rank:]], -1)


def mla_mix(cfg: KimiLinearConfig, w: MLAWeights, x_BSC: Tensor, cache: Latents | None = None) -> Tensor:
    """All of the layer but its output projection: normed input [B, S, C] → [B, S, H·v] in the same dtype.

    With a cache the new positions are appended to it and see everything in it.
    """
    q_BSHK = linear(x_BSC, w.q_proj).unflatten(-1, (cfg.num_heads, cfg.qk_dim))
    kv_a_BSL = linear(x_BSC, w.kv_a_proj)
    if cache is None:
        return _causal(cfg, w, q_BSHK, normed_latent(kv_a_BSL, w.kv_a_norm))
    before, after = cache.length, cache.length + x_BSC.shape[1]
    cache.append(kv_a_BSL, w.kv_a_norm)
    if not before:
        return _causal(cfg, w, q_BSHK, cache.read(0, after))
    if x_BSC.shape[1] == 1 and isinstance(w.kv_b_proj, Tensor):
        return _absorbed(cfg, w.kv_b_proj, q_BSHK, cache.read(0, after))
    return _continued(cfg, w, q_BSHK, cache, before)


def _causal(cfg: KimiLinearConfig, w: MLAWeights, q_BSHK: Tensor, latent_BSL: Tensor) -> Tensor:
    """Each query sees its own latent and those before."""
    k, v = _expand(cfg, w, latent_BSL)
    o = F.scaled_dot_product_attention(q_BSHK.transpose(1, 2), k, v, is_causal=True)
    return o[..., : cfg.v_dim].transpose(1, 2).flatten(2)


def _continued(cfg: KimiLinearConfig, w: MLAWeights, q_BSHK: Tensor, cache: Latents, before: int) -> Tensor:
    """Queries behind `before` latents: attention to blocks of them and to each other, joined by their softmax sums."""
    q = q_BSHK.transpose(1, 2)
    o, total = part_attention(q, *_expand(cfg, w, cache.read(before, before + q.shape[2])), causal=True)
    o = widen(o)
    for start in range(0, before, LATENT_BLOCK):
        past, log_sum = part_attention(q, *_expand(cfg, w, cache.read(start, min(start + LATENT_BLOCK, before))))
        o, total = reference.join(o, total, past, log_sum, cfg.v_dim, o.dtype)
    return o.transpose(1, 2).flatten(2).to(q_BSHK.dtype)


def _expand(cfg: KimiLinearConfig, w: MLAWeights, latent_BSL: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [B, H, S, qk]. Kernels that never hold all scores want one size for both; v is padded to it."""
    latent_BSK, shared_BSR = latent_BSL.split([cfg.kv_rank, cfg.qk_rope_dim], -1)
    kv_BSN = linear(latent_BSK, w.kv_b_proj)
    keys_values = dispatch.keys_values if fused.serves(kv_BSN) else reference.keys_values
    both = keys_values(kv_BSN.flatten(0, 1), shared_BSR.flatten(0, 1), cfg.num_heads, cfg.qk_nope_dim)
    return tuple(x_HTD.unflatten(1, kv_BSN.shape[:2]).transpose(0, 1) for x_HTD in both)


def part_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> tuple[Tensor, Tensor]:
    """softmax(q kᵀ / √D) v over part of the keys, and the logarithm of its sum of exponentials [B, H, S] ≥ FP32.

    q, k, v [B, H, ·, D], the result in their dtype; causal needs as many keys as queries. What PyTorch's
    scaled_dot_product_attention calls, which does not return the sums.
    """
    if q.device.type != "cuda":
        o, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
    elif q.dtype in (torch.bfloat16, torch.float16):
        o, log_sum, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)
    else:
        o, log_sum, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal)
    return o, log_sum[..., : q.shape[2]]


def _absorbed(cfg: KimiLinearConfig, kv_b: Tensor, q_BSHK: Tensor, latent_BSL: Tensor) -> Tensor:
    """One query a sequence against the latents themselves: kv_b is applied to the query and the output instead."""
    to_k, to_v = kv_b.unflatten(0, (cfg.num_heads, -1)).split([cfg.qk_nope_dim, cfg.v_dim], 1)
    q_nope, q_shared = q_BSHK[:, 0].split([cfg.qk_nope_dim, cfg.qk_rope_dim], -1)
    q_BHL = torch.cat([torch.einsum("bhn,hnl->bhl", q_nope, to_k), q_shared], -1)
    scores_BHS = widen(q_BHL @ latent_BSL.mT) * cfg.qk_dim**-0.5
    seen_BHL = scores_BHS.softmax(-1).to(latent_BSL.dtype) @ latent_BSL[..., : cfg.kv_rank]
    return torch.einsum("bhl,hvl->bhv", seen_BHL, to_v).flatten(1)[:, None]
