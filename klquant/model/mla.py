"""Multi-head latent attention without position encoding: keys and values are expanded from one latent a token."""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from klquant.checkpoint.config import KimiLinearConfig
from klquant.model.norm import LATENT_EPS, rms_norm, widen
from klquant.model.weights import MLAWeights, linear

# Queries scored at once when a cache precedes them: bounds the mask.
QUERY_BLOCK = 512


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

    def append(self, kv_a_BSL: Tensor, norm: Tensor) -> Tensor:
        """Add what kv_a_proj made of new positions and return the latents of all, the new ones last."""
        latent_BSL = normed_latent(kv_a_BSL, norm)
        end = self.length + latent_BSL.shape[1]
        if end > self.buffer_BSL.shape[1]:
            B, _, L = latent_BSL.shape
            grown = self.buffer_BSL.new_empty(B, max(end, 2 * self.length), L)
            grown[:, : self.length] = self.buffer_BSL[:, : self.length]
            self.buffer_BSL = grown
        self.buffer_BSL[:, self.length : end] = latent_BSL
        self.length = end
        return self.buffer_BSL[:, :end]


class Latents(Protocol):
    """Latents of the `length` tokens before the new ones; how they are kept is the cache's own business."""

    length: int

    def append(self, kv_a_BSL: Tensor, norm: Tensor) -> Tensor: ...


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
    offset = cache.length if cache else 0
    latent_BSL = cache.append(kv_a_BSL, w.kv_a_norm) if cache else normed_latent(kv_a_BSL, w.kv_a_norm)
    if offset and x_BSC.shape[1] == 1 and isinstance(w.kv_b_proj, Tensor):
        return _absorbed(cfg, w.kv_b_proj, q_BSHK, latent_BSL)
    return _expanded(cfg, w, q_BSHK, latent_BSL, offset)


def _expanded(cfg: KimiLinearConfig, w: MLAWeights, q_BSHK: Tensor, latent_BSL: Tensor, offset: int) -> Tensor:
    """Attention over keys and values expanded from the latents, of which the first `offset` precede the queries."""
    kv = linear(latent_BSL[..., : cfg.kv_rank], w.kv_b_proj).unflatten(-1, (cfg.num_heads, -1)).transpose(1, 2)
    k_nope, v = kv.split([cfg.qk_nope_dim, cfg.v_dim], -1)
    shared = latent_BSL[:, None, :, cfg.kv_rank :].expand(-1, cfg.num_heads, -1, -1)
    k = torch.cat([k_nope, shared], -1)
    q = q_BSHK.transpose(1, 2)
    # The kernels that never hold all scores want one size for q, k and v.
    v = F.pad(v, (0, cfg.qk_dim - cfg.v_dim)) if cfg.v_dim < cfg.qk_dim else v
    if not offset:
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    else:
        blocks = []
        for start in range(0, q.shape[2], QUERY_BLOCK):
            block = q[:, :, start : start + QUERY_BLOCK]
            seen = offset + start + block.shape[2]
            mask = torch.ones(block.shape[2], seen, dtype=torch.bool, device=q.device).tril(offset + start)
            o = F.scaled_dot_product_attention(block, k[:, :, :seen], v[:, :, :seen], attn_mask=mask)
            blocks.append(o)
        o = torch.cat(blocks, 2)
    return o[..., : cfg.v_dim].transpose(1, 2).flatten(2)


def _absorbed(cfg: KimiLinearConfig, kv_b: Tensor, q_BSHK: Tensor, latent_BSL: Tensor) -> Tensor:
    """One query a sequence against the latents themselves: kv_b is applied to the query and the output instead."""
    to_k, to_v = kv_b.unflatten(0, (cfg.num_heads, -1)).split([cfg.qk_nope_dim, cfg.v_dim], 1)
    q_nope, q_shared = q_BSHK[:, 0].split([cfg.qk_nope_dim, cfg.qk_rope_dim], -1)
    q_BHL = torch.cat([torch.einsum("bhn,hnl->bhl", q_nope, to_k), q_shared], -1)
    scores_BHS = widen(q_BHL @ latent_BSL.mT) * cfg.qk_dim**-0.5
    seen_BHL = scores_BHS.softmax(-1).to(latent_BSL.dtype) @ latent_BSL[..., : cfg.kv_rank]
    return torch.einsum("bhl,hvl->bhv", seen_BHL, to_v).flatten(1)[:, None]
