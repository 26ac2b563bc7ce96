"""Dense bit packing, the layout of compressed-tensors' `pack-quantized`.

Codes are stored as `code + 2^(b−1)`, least significant bit first, without gaps along K; a row is padded to whole
32-bit words. Eight codes of b bits fill exactly b bytes, which is the unit this module works in.
"""

import torch
from torch import Tensor

from klquant.core.spec import packed_words


def pack(codes_NK: Tensor, bits: int) -> Tensor:
    """int8 codes [..., N, K] in [−2^(b−1), 2^(b−1)) → int32 [..., N, ceil(K·b/32)]."""
    *lead, k = codes_NK.shape
    words = packed_words(k, bits)
    unsigned = codes_NK.to(torch.int16) + (1 << (bits - 1))
    if k % 8:
        unsigned = torch.nn.functional.pad(unsigned, (0, -k % 8))
    if bits == 8:
        row_bytes = unsigned.to(torch.uint8)
    elif bits == 4:
        row_bytes = (unsigned[..., 0::2] | (unsigned[..., 1::2] << 4)).to(torch.uint8)
    else:
        shifts = torch.arange(8, device=codes_NK.device, dtype=torch.int64) * bits
        block = (unsigned.unflatten(-1, (-1, 8)).to(torch.int64) << shifts).sum(-1)
        byte_shifts = torch.arange(bits, device=codes_NK.device, dtype=torch.int64) * 8
        row_bytes = ((block.unsqueeze(-1) >> byte_shifts) & 0xFF).to(torch.uint8).flatten(-2)
    want = words * 4
    if row_bytes.shape[-1] < want:
        row_bytes = torch.nn.functional.pad(row_bytes, (0, want - row_bytes.shape[-1]))
    return row_bytes[..., :want].flatten().view(torch.int32).view(*lead, words)


def unpack(words_NW: Tensor, bits: int, k: int) -> Tensor:
    """The inverse of `pack`: int32 [..., N, W] → int8 codes [..., N, K]."""
    # As one row: where there is a single word, `contiguous` is content with any stride, and `view` is not.
    row_bytes = words_NW.reshape(-1).contiguous().view(torch.uint8).view(*words_NW.shape[:-1], -1)
    if bits == 8:
        unsigned = row_bytes
    elif bits == 4:
        unsigned = torch.stack((row_bytes & 0xF, row_bytes >> 4), dim=-1).flatten(-2)
    else:
        row_bytes = torch.nn.functional.pad(row_bytes, (0, -row_bytes.shape[-1] % bits))
        byte_shifts = torch.arange(bits, device=words_NW.device, dtype=torch.int64) * 8
        block = (row_bytes.unflatten(-1, (-1, bits)).to(torch.int64) << byte_shifts).sum(-1)
        shifts = torch.arange(8, device=words_NW.device, dtype=torch.int64) * bits
        unsigned = ((block.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).flatten(-2)
    return (unsigned[..., :k].to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
