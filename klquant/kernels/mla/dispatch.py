"""MLA's cache and decode step as the engine sees them: Triton on a CUDA device, plain torch elsewhere."""

import torch
from torch import Tensor

from klquant.kernels.mla import reference
from klquant.kernels.mla.pages import PAGE_SIZE, LatentPages
from klquant.kernels.mla.tiles import decode_tile


def write_latent(kv_a: Tensor, norm_weight: Tensor, pages: LatentPages, position_T: Tensor) -> None:
    """Put the latents of T tokens into their pages: one launch.

    kv_a [T, L]: what kv_a_proj made, in 16 bits on a GPU, rows may be strided. Its first `len(norm_weight)` values are
    RMS-normed, the rest kept. position_T [T] int64: page · S + offset; −1: padding, nothing is written.
    """
    if not kv_a.is_cuda:
        return reference.write_latent(kv_a, norm_weight, pages, position_T)
    from klquant.kernels.mla import triton

    return triton.write_latent(kv_a, norm_weight, pages, position_T)


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

    card = torch.cuda.get_device_properties(q_BHK.device)
    tile = decode_tile(
        len(q_BHK), page_table_BM.shape[1] * PAGE_SIZE, card.multi_processor_count,
        card.shared_memory_per_block_optin >> 10,
    )  # fmt: skip
    return triton.mla_decode(q_BHK, kv_b, pages, page_table_BM, length_B, scale, tile)
