"""The linear kernels' results in plain torch, in the dtype of the activations: the path of a CPU."""

import torch.nn.functional as F
from torch import Tensor

from klquant.kernels.linear.layout import Packed, split_rows, values


def linear(x_MK: Tensor, w: Packed) -> Tensor:
    """x [.., K] → [.., N]."""
    return F.linear(x_MK, values(w, x_MK.dtype))


def gate_up(x_MK: Tensor, w: Packed, n: int) -> Tensor:
    """silu(gate(x)) · up(x), [.., n], of an interleaved weight."""
    gate, up = split_rows(values(w, x_MK.dtype), n)
    return F.silu(F.linear(x_MK, gate)) * F.linear(x_MK, up)
