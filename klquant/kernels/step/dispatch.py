"""Where the tokens of a step go, and their embeddings: Triton on a CUDA device, plain torch elsewhere.

Shape suffixes: B = rows of a step, N = slots and a row for padding, M = most pages of a sequence, V = vocabulary,
C = width of the stream.
"""

from torch import Tensor

from klquant.kernels.step import reference


def advance(slot_B: Tensor, length_N: Tensor, table_NM: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Count one more token in `length_N` for every row: (index int64, table [B, M], length, position int64).

    One launch. slot int32, −1 is padding; length and table int32. index: the row of the control tensors, the last one
    for padding. length: with the new token, 0 for padding. position: page · PAGE_SIZE + offset of the token, −1 for
    padding.
    """
    if not slot_B.is_cuda:
        return reference.advance(slot_B, length_N, table_NM)
    from klquant.kernels.step import triton

    return triton.advance(slot_B, length_N, table_NM)


def embed_next(token_N: Tensor, index_B: Tensor, embedding_VC: Tensor) -> Tensor:
    """Embeddings [B, C] FP32 of the tokens int64 at `index_B`, one launch. A token of −1 gets any row."""
    if not embedding_VC.is_cuda:
        return reference.embed_next(token_N, index_B, embedding_VC)
    from klquant.kernels.step import triton

    return triton.embed_next(token_N, index_B, embedding_VC)
