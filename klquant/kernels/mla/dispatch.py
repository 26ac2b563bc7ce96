"""MLA's cache, its decode step and what surrounds a chunk's attention: Triton on a CUDA device, else plain torch."""

import torch
from torch import Tensor

from klquant.kernels.card import has_wgmma, starts_early
from klquant.kernels.mla import reference
from klquant.kernels.mla.pages import PAGE_SIZE, LatentPages
from klquant.kernels.mla.tiles import STAGED_RANK, decode_tile


def write_latent(kv_a: Tensor, norm_weight: Tensor, pages: LatentPages, position_T: Tensor) -> None:
    """Put the latents of T tokens into their pages: one launch.

    kv_a [T, L]: what kv_a_proj made, in 16 bits on a GPU, rows may be strided. Its first `len(norm_weight)` values are
    RMS-normed, the rest kept. position_T [T] int64: page · S + offset; −1: padding, nothing is written.
    """
    if not kv_a.is_cuda:
        return reference.write_latent(kv_a, norm_weight, pages, position_T)
    from klquant.kernels.mla import write

    return write.write_latent(kv_a, norm_weight, pages, position_T, starts_early(kv_a))


def mla_decode(
    q_BHK: Tensor, kv_b: Tensor, pages: LatentPages, page_table_BM: Tensor, length_B: Tensor, scale: float
) -> Tensor:
    """Attention of one query a sequence to its `length` latents, the query's own included: [B, H·v] in q's dtype.

    q [B, H, nope + rope]; kv_b [H·(nope + v), kv_rank] plain, q's dtype; page_table [B, M] int32, of which the first
    ⌈length / S⌉ are read; length_B int32, 0 for a row that is padding (its output is 0); scale of the scores. Three
    launches whose grids depend on B, H, M and the card only: one CUDA graph serves all lengths.
    """
    if not q_BHK.is_cuda:
        return reference.mla_decode(q_BHK, kv_b, pages, page_table_BM, length_B, scale)
    from klquant.kernels.mla import triton

    processors = torch.cuda.get_device_properties(q_BHK.device).multi_processor_count
    staged = has_wgmma(q_BHK) and kv_b.shape[1] >= STAGED_RANK
    tile = decode_tile(len(q_BHK), page_table_BM.shape[1] * PAGE_SIZE, processors, staged)
    return triton.mla_decode(q_BHK, kv_b, pages, page_table_BM, length_B, scale, tile)


def read_latent(pages: LatentPages, at_T: Tensor, dtype: torch.dtype) -> Tensor:
    """Latents [T, L] that lie at `at_T` (int64: page · S + offset; −1: zeros), as values of `dtype`: one launch."""
    if not at_T.is_cuda:
        return reference.read_latent(pages, at_T, dtype)
    from klquant.kernels.mla import prefill

    return prefill.read_latent(pages, at_T, dtype)


def keys_values(kv_TF: Tensor, shared_TR: Tensor, heads: int, nope: int) -> tuple[Tensor, Tensor]:
    """Keys [H, T, nope + R] and values [H, T, ≥ v], views of other layouts: one launch.

    kv [T, H·(nope + v)] contiguous: what kv_b makes of latents. shared [T, R]: the key part that heads share; rows may
    be strided. Attention kernels want values no narrower than keys: zeros follow.
    """
    if not kv_TF.is_cuda:
        return reference.keys_values(kv_TF, shared_TR, heads, nope)
    from klquant.kernels.mla import prefill

    return prefill.keys_values(kv_TF, shared_TR, heads, nope)


def join(
    a: Tensor, a_sum: Tensor, b: Tensor, b_sum: Tensor, v_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention to two sets of keys as one to both: (o [H, S, v_dim] of `dtype`, log-sum [H, S]), one launch.

    a, b [H, S, ≥ v_dim], in any layout with contiguous heads; a_sum, b_sum [H, S] FP32: the logarithms of the sets'
    sums of exponentials. (e^a_sum a + e^b_sum b) / (e^a_sum + e^b_sum), in FP32.
    """
    if not a.is_cuda:
        return reference.join(a, a_sum, b, b_sum, v_dim, dtype)
    from klquant.kernels.mla import prefill

    return prefill.join(a, a_sum, b, b_sum, v_dim, dtype)
