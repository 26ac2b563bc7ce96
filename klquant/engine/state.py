"""What the engine remembers of its sequences on one device: KDA slots, latent pages, and where each sequence stands.

Shape suffixes: B = rows of a step, N = slots, M = most pages of a sequence, T = positions of a chunk.
A row is a slot number, or −1 for padding. The control tensors have one row more than there are slots: padding reads
and writes that one, so no operation needs to know which rows are real.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from klquant.checkpoint.config import KimiLinearConfig
from klquant.kernels.mla.pages import LatentPages, pages_for
from klquant.kernels.step.dispatch import advance
from klquant.model.kda import KDAState

# Bits of a latent value → dtype of the pages; None is the activations' own. INT8 and not FP8: with a scale for every
# token its steps are the finer ones, unless a value is ten times what the others deviate.
CACHE_BITS = {16: None, 8: torch.int8}


def upload(values: Tensor, device: torch.device) -> Tensor:
    """A copy of a CPU tensor that does not wait for what the device has to do before."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


@dataclass(frozen=True)
class StepRows:
    """The rows of a decode step: slot_B int32 (−1: padding); index_B, the rows of the control tensors; table_BM int32;
    length_B int32 with the new token (0: padding); position_B int64, where its latent goes (−1: nowhere)."""

    slot_B: Tensor
    index_B: Tensor
    table_BM: Tensor
    length_B: Tensor
    position_B: Tensor


@dataclass(frozen=True)
class DeviceState:
    """`kda` and `latent` by layer, KDA tensors with a row a slot. length [N + 1] and table [N + 1, M] int32."""

    kda: dict[int, KDAState]
    latent: dict[int, LatentPages]
    length: Tensor
    table: Tensor

    @classmethod
    def empty(
        cls, cfg: KimiLinearConfig, layers: Iterable[int], *, slots: int, pages: int, max_context: int,
        cache_bits: int, dtype: torch.dtype, device: torch.device,
    ) -> "DeviceState":  # fmt: skip
        """State of `layers` for activations of `dtype`. Pages are not initialized, slots are when they are bound."""
        layers = list(layers)
        cache_dtype = CACHE_BITS[cache_bits] or dtype
        return cls(
            kda={i: KDAState.zeros(cfg, slots, dtype, device) for i in layers if not cfg.is_mla(i)},
            latent={i: LatentPages.empty(pages, cfg.latent_dim, cache_dtype, device) for i in layers if cfg.is_mla(i)},
            length=torch.zeros(slots + 1, dtype=torch.int32, device=device),
            table=torch.zeros(slots + 1, pages_for(max_context), dtype=torch.int32, device=device),
        )

    def bind(self, slot: int, pages: Sequence[int]) -> None:
        """Give a slot its pages."""
        self.table[slot, : len(pages)] = upload(torch.tensor(pages, dtype=torch.int32), self.table.device)

    def clear(self, slot: int) -> None:
        """Forget what the slot held: a sequence begins."""
        for state in self.kda.values():
            state.conv[slot] = 0
            state.s[slot] = 0

    def copy(self, source: int, target: int, pages: tuple[int, int] | None) -> None:
        """Let KDA state and length of slot `target` be those of `source`, and the second page the first."""
        self.length[target] = self.length[source]
        for latent in self.latent.values() if pages else ():
            latent.copy(*pages)
        for state in self.kda.values():
            state.conv[target] = state.conv[source]
            state.s[target] = state.s[source]

    def advance(self, slot_B: Tensor) -> StepRows:
        """Count one more token for every row and say where it goes."""
        return StepRows(slot_B, *advance(slot_B, self.length, self.table))
