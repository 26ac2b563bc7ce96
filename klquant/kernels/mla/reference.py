"""Writing latents, attending to them, and what surrounds a chunk's attention in plain torch: the path of a CPU."""

import torch
import torch.nn.functional as F
from torch import Tensor

from klquant.kernels.mla.pages import CODE_MAX, PAGE_SIZE, LatentPages, page_position, read_latent
from klquant.kernels.norm.reference import LATENT_EPS, rms_norm, widen


def write_latent(kv_a: Tensor, norm_weight: Tensor, pages: LatentPages, position_T: Tensor) -> None:
    """`klquant.kernels.mla.dispatch.write_latent`: one scale a latent, its largest magnitude over CODE_MAX."""
    rank = len(norm_weight)
    latent = torch.cat([rms_norm(kv_a[:, :rank], norm_weight, LATENT_EPS), kv_a[:, rank:]], -1)[position_T >= 0]
    at = position_T[position_T >= 0]
    if pages.scale is None:
        pages.data.flatten(0, 1)[at] = latent.to(pages.data.dtype)
        return
    dtype = pages.data.dtype
    scale = latent.float().abs().amax(-1) / CODE_MAX[dtype]
    # A latent of zeros has codes 0 whatever its scale.
    code = latent.float() / scale.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    code = code.round().to(dtype) if dtype == torch.int8 else code.to(dtype)
    pages.data.view(torch.uint8).flatten(0, 1)[at] = code.view(torch.uint8)
    pages.scale.flatten()[at] = scale


def mla_decode(
    q_BHK: Tensor, kv_b: Tensor, pages: LatentPages, page_table_BM: Tensor, length_B: Tensor, scale: float
) -> Tensor:
    """`klquant.kernels.mla.dispatch.mla_decode`, in the dtype of the activations."""
    heads, rank = q_BHK.shape[1], kv_b.shape[1]
    nope = q_BHK.shape[2] - (pages.data.shape[-1] - rank)
    to_k, to_v = kv_b.unflatten(0, (heads, -1)).split([nope, kv_b.shape[0] // heads - nope], 1)
    q_BHL = torch.cat([torch.einsum("bhn,hnl->bhl", q_BHK[..., :nope], to_k), q_BHK[..., nope:]], -1)
    out = q_BHK.new_zeros(len(q_BHK), heads, to_v.shape[1])
    for b, length in enumerate(length_B.tolist()):
        if length:
            position = torch.arange(length, device=q_BHK.device)
            at = page_position(page_table_BM[b, position // PAGE_SIZE], position)
            latent = read_latent(pages, at, q_BHK.dtype)
            weight = (widen(q_BHL[b] @ latent.T) * scale).softmax(-1).to(latent.dtype)
            out[b] = torch.einsum("hl,hvl->hv", weight @ latent[:, :rank], to_v)
    return out.flatten(1)


def keys_values(kv_TF: Tensor, shared_TR: Tensor, heads: int, nope: int) -> tuple[Tensor, Tensor]:
    """`klquant.kernels.mla.dispatch.keys_values`, in any dtype; values as wide as keys or wider are not padded."""
    kv_HTK = kv_TF.unflatten(-1, (heads, -1)).transpose(0, 1)
    k, v = kv_HTK.split([nope, kv_HTK.shape[-1] - nope], -1)
    k = torch.cat([k, shared_TR.expand(heads, -1, -1)], -1)
    missing = k.shape[-1] - v.shape[-1]
    return k, F.pad(v, (0, missing)) if missing > 0 else v


def join(
    a: Tensor, a_sum: Tensor, b: Tensor, b_sum: Tensor, v_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`klquant.kernels.mla.dispatch.join`, in any dtype.

    softmax over two sets = (e^a o_1 + e^b o_2) / (e^a + e^b), a and b the logarithms of the sets' sums of exponentials.
    """
    total = torch.logaddexp(a_sum, b_sum)
    a, b = (widen(o[..., :v_dim]) * (part - total).exp()[..., None] for o, part in ((a, a_sum), (b, b_sum)))
    return (a + b).to(dtype), total
