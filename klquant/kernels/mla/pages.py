"""The paged cache of latents of one MLA layer.

Shape suffixes of `klquant.kernels.mla`: B = sequences, T = tokens, H = heads, L = latent values a token (kv_rank normed
ones ‖ the key part shared by all heads), P = pages, S = tokens a page, M = most pages a sequence has.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

PAGE_SIZE = 64
# Largest magnitude of a code, by dtype of the pages.
CODE_MAX = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}


@dataclass(frozen=True)
class LatentPages:
    """data [P, S, L] in the activations' dtype, or codes in FP8 (e4m3) or INT8 with scale [P, S] FP32.

    A value is code · scale.
    """

    data: Tensor
    scale: Tensor | None = None

    @classmethod
    def empty(cls, pages: int, latent_dim: int, dtype: torch.dtype, device: torch.device | str) -> "LatentPages":
        """Pages whose contents nobody reads before `write_latent` made them."""
        data = torch.empty(pages, PAGE_SIZE, latent_dim, dtype=dtype, device=device)
        return cls(data, torch.empty(pages, PAGE_SIZE, device=device) if dtype in CODE_MAX else None)

    def copy(self, source: int, target: int) -> None:
        """Let page `target` hold what `source` does."""
        for tensor in (self.data.view(torch.uint8), self.scale):
            if tensor is not None:
                tensor[target] = tensor[source]

    @property
    def format(self) -> str:
        """As the kernels name it: fp8, int8 or plain."""
        return {torch.float8_e4m3fn: "fp8", torch.int8: "int8"}.get(self.data.dtype, "plain")


def pages_for(tokens: int) -> int:
    """Pages that so many tokens of one sequence take."""
    return -(-tokens // PAGE_SIZE)


def page_position(page_T: Tensor, position_T: Tensor) -> Tensor:
    """Where positions of sequences lie in the pool: page · PAGE_SIZE + offset, int64. page_T: the pages they are in."""
    return page_T.long() * PAGE_SIZE + position_T % PAGE_SIZE


def read_latent(pages: LatentPages, at_T: Tensor, dtype: torch.dtype) -> Tensor:
    """The latents that lie at `at_T` (int64, `page_position`; −1: zeros), as values [T, L]."""
    # Bytes, because not every operation knows FP8.
    raw = pages.data.view(torch.uint8) if pages.scale is not None else pages.data
    latent = raw.flatten(0, 1)[at_T]
    if pages.scale is not None:
        latent = latent.view(pages.data.dtype).float() * pages.scale.flatten()[at_T, None]
    return latent.to(dtype).masked_fill(at_T[:, None] < 0, 0)
