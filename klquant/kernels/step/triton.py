"""The beginning of a decode step: as operations of torch it would be some twenty launches."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from klquant.kernels.mla.pages import PAGE_SIZE

BLOCK = 1024


@triton.jit
def advance_kernel(
    slot, length, table, index_out, table_out, length_out, position_out, padding, pages,
    PAGE_SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a row."""
    row = tl.program_id(0).to(tl.int64)
    here = tl.load(slot + row).to(tl.int64)
    real = here >= 0
    index = tl.where(real, here, padding)
    last = tl.where(real, tl.load(length + index), 0)
    # All have read what is overwritten here; no two rows but padding share a slot.
    tl.debug_barrier()
    tl.store(length + index, last + 1, mask=real)
    page = tl.load(table + index * pages + last // PAGE_SIZE).to(tl.int64)
    tl.store(index_out + row, index)
    tl.store(length_out + row, tl.where(real, last + 1, 0))
    tl.store(position_out + row, tl.where(real, page * PAGE_SIZE + last % PAGE_SIZE, -1))
    for start in range(0, pages, BLOCK):
        m = start + tl.arange(0, BLOCK)
        some = tl.load(table + index * pages + m, mask=m < pages)
        tl.store(table_out + row * pages + m, some, mask=m < pages)


@triton.jit
def embed_kernel(token, index, embedding, out, width, BLOCK: tl.constexpr):
    """Grid (rows, blocks of the width)."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    which = tl.maximum(tl.load(token + tl.load(index + row)), 0)
    x = tl.load(embedding + which * width + c, mask=c < width)
    tl.store(out + row * width + c, x.to(tl.float32), mask=c < width)


def advance(slot_B: Tensor, length_N: Tensor, table_NM: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One launch."""
    rows, pages = len(slot_B), table_NM.shape[1]
    index_B, position_B = (torch.empty(rows, dtype=torch.int64, device=slot_B.device) for _ in "ip")
    table_BM = torch.empty(rows, pages, dtype=torch.int32, device=slot_B.device)
    length_B = torch.empty(rows, dtype=torch.int32, device=slot_B.device)
    advance_kernel[(rows,)](
        slot_B, length_N, table_NM, index_B, table_BM, length_B, position_B, len(length_N) - 1, pages,
        PAGE_SIZE=PAGE_SIZE, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return index_B, table_BM, length_B, position_B


def embed_next(token_N: Tensor, index_B: Tensor, embedding_VC: Tensor) -> Tensor:
    """One launch. The embedding is contiguous."""
    rows, width = len(index_B), embedding_VC.shape[1]
    out = torch.empty(rows, width, dtype=torch.float32, device=embedding_VC.device)
    embed_kernel[(rows, triton.cdiv(width, BLOCK))](token_N, index_B, embedding_VC, out, width, BLOCK=BLOCK)
    return out
