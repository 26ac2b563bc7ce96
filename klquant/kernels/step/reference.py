"""The beginning of a decode step in plain torch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from klquant.kernels.mla.pages import PAGE_SIZE


def advance(slot_B: Tensor, length_N: Tensor, table_NM: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`klquant.kernels.step.dispatch.advance`."""
    real_B = slot_B >= 0
    index_B = torch.where(real_B, slot_B, len(length_N) - 1).long()
    length_N.index_add_(0, index_B, real_B.int())
    table_BM, length_B = table_NM[index_B], torch.where(real_B, length_N[index_B], 0)
    last_B = (length_B - 1).clamp_min(0).long()
    page_B = table_BM.gather(1, last_B[:, None] // PAGE_SIZE)[:, 0].long()
    position_B = torch.where(real_B, page_B * PAGE_SIZE + last_B % PAGE_SIZE, -1)
    return index_B, table_BM, length_B, position_B


def embed_next(token_N: Tensor, index_B: Tensor, embedding_VC: Tensor) -> Tensor:
    """`klquant.kernels.step.dispatch.embed_next`."""
    return F.embedding(token_N[index_B].clamp_min(0), embedding_VC).float()
