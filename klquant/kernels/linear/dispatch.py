"""Packed linear maps and MLPs as the model sees them: Triton on a CUDA device, plain torch elsewhere."""

from dataclasses import dataclass
from math import lcm

import torch
import torch.nn.functional as F
from torch import Tensor

from klquant.core.grid import Quantized
from klquant.kernels.card import has_wgmma
from klquant.kernels.linear import reference
from klquant.kernels.linear.layout import ROW_MULTIPLE, Packed, interleave, pack, pack_plain
from klquant.kernels.linear.tiles import Tile, linear_tile, parts_tile
from klquant.kernels.norm.parts import WIDE_TOKENS, Parts

# From so many tokens on, unpacking a weight costs less than what torch's product gains on unpacked ones.
UNPACK_TOKENS = 512
# For more tokens a small weight beside a large one is worth a launch of its own.
BESIDE_TOKENS = 64

# A weight on its grid, or in 16 bits.
Weight = Quantized | Tensor


def pack_weight(w: Weight, row_multiple: int = ROW_MULTIPLE) -> Packed:
    """Any weight [(E,) N, K] in the kernels' layout; a plain tensor is stored as BF16."""
    return pack(w, row_multiple) if isinstance(w, Quantized) else pack_plain(w, row_multiple)


def pack_mlp(gate: Weight, up: Weight, down: Weight) -> tuple[Packed, Packed]:
    """gate and up [(E,) I, C] as one interleaved weight, and down [(E,) C, I], of an MLP or of E experts.

    gate and up must be on the same kind of grid.
    """
    packed_down = pack_weight(down)
    # The activations have as many columns as down has inputs, padding included; zero rows of gate and up fill them.
    multiple = lcm(ROW_MULTIPLE, packed_down.k_padded)
    return interleave(pack_weight(gate, multiple), pack_weight(up, multiple)), packed_down


def pad_inputs(x_MK: Tensor, w: Packed) -> Tensor:
    """x [M, ≥ K] with zeros up to whole bricks of w. The model's own shapes need none."""
    assert x_MK.stride(-1) == 1, "the inputs of a token must be contiguous"
    missing = w.k_padded - x_MK.shape[-1]
    return F.pad(x_MK, (0, missing)) if missing > 0 else x_MK


@dataclass(frozen=True)
class QuantLinear:
    """A packed weight [N, K] as a linear map: what `klquant.model` takes in place of a tensor."""

    weight: Packed

    @classmethod
    def of(cls, w: Weight) -> "QuantLinear":
        return cls(pack_weight(w))

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.n, self.weight.k

    def __call__(self, x: Tensor) -> Tensor:
        """x [.., K] in BF16 or FP16 (any dtype on a CPU) → [.., N] in the same dtype."""
        if not x.is_cuda:
            return reference.linear(x, self.weight)
        return apply_linear(x.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])

    def wide(self, x: Tensor) -> Tensor:
        """x [.., K] → [.., N] in FP32, by the kernel whatever the number of tokens."""
        if not x.is_cuda:
            return reference.linear(x, self.weight).float()
        from klquant.kernels.linear.triton import linear

        x_MK = pad_inputs(x.flatten(0, -2), self.weight)
        y = torch.empty(len(x_MK), self.weight.n, dtype=torch.float32, device=x.device)
        return linear(x_MK, self.weight, _tile(x_MK, self.weight), out=y).unflatten(0, x.shape[:-1])

    def parts(self, x_MK: Tensor) -> Tensor | Parts:
        """x [M, K] → [M, N], FP32 for few tokens; or, where programs that share a row's inputs are faster, what each of
        them made."""
        w = self.weight
        tile, parts = parts_tile(w, len(x_MK)) if x_MK.is_cuda else (None, 1)
        if parts == 1:
            return self.wide(x_MK) if len(x_MK) <= WIDE_TOKENS else self(x_MK)
        from klquant.kernels.linear.triton import linear_in_parts

        return linear_in_parts(pad_inputs(x_MK, w), w, tile, parts)

    def beside(self, x_MK: Tensor, plain_NK: Tensor) -> tuple[Tensor, Tensor]:
        """x [M, K] → its products with this weight and with a small contiguous one in x's dtype.

        One launch for few tokens: among the programs of a large weight those of a small one cost little.
        """
        if not x_MK.is_cuda or len(x_MK) > BESIDE_TOKENS:
            return self(x_MK), F.linear(x_MK, plain_NK)
        from klquant.kernels.linear.triton import linear_beside

        x_MK = pad_inputs(x_MK, self.weight)
        return linear_beside(x_MK, self.weight, _tile(x_MK, self.weight), plain_NK)


@dataclass(frozen=True)
class QuantMLP:
    """down(silu(gate(x)) · up(x)) with packed weights; gate and up interleaved in one."""

    gate_up: Packed
    down: Packed

    @classmethod
    def of(cls, gate: Weight, up: Weight, down: Weight) -> "QuantMLP":
        return cls(*pack_mlp(gate, up, down))

    def __call__(self, x: Tensor) -> Tensor:
        """x [.., C] → [.., C]: two launches."""
        if not x.is_cuda:
            return reference.linear(reference.gate_up(x, self.gate_up, self.down.k), self.down)
        h = apply_linear(x.flatten(0, -2), self.gate_up, gated=True)
        return apply_linear(h, self.down).unflatten(0, x.shape[:-1])

    def parts(self, x_MC: Tensor) -> Tensor | Parts:
        """x [M, C] → [M, C] as `QuantLinear.parts` of the down projection has it."""
        if not x_MC.is_cuda:
            return self(x_MC)
        return QuantLinear(self.down).parts(apply_linear(x_MC, self.gate_up, gated=True))


def _tile(x_MK: Tensor, w: Packed, gated: bool = False) -> Tile:
    return linear_tile(w, len(x_MK), gated, has_wgmma(x_MK))


def apply_linear(x_MK: Tensor, w: Packed, gated: bool = False) -> Tensor:
    """x [M, K], or with columns padded already, through the kernel and the tile its shape gets.

    For many tokens a copy of w in x's dtype, made and dropped again, and torch's own product are faster.
    """
    from klquant.kernels.linear.triton import linear, silu_mul, unpacked

    x_MK = pad_inputs(x_MK, w)
    if w.bits < 16 and x_MK.shape[0] >= UNPACK_TOKENS:
        y = F.linear(x_MK[:, : w.k_padded], unpacked(w, x_MK.dtype, gated))
        return silu_mul(y) if gated else y
    return linear(x_MK, w, _tile(x_MK, w, gated), gated=gated)
