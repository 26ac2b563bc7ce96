"""The norm in front of a mixer or an MLP with the sum before it, and KDA's: Triton on a CUDA device, else torch."""

import torch.nn.functional as F
from torch import Tensor

from klquant.kernels.norm import reference
from klquant.kernels.norm.parts import Parts

# For more tokens a linear map beside the norm is a product of its own.
FEW_TOKENS = 4


def add_rms_norm(
    h_TC: Tensor, delta_TC: Tensor | Parts | None, weight_C: Tensor, eps: float, turn_T: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(h + delta, rms_norm(h + delta)), each [T, C]: one launch. Without a delta the first is h itself.

    The sum is of h's dtype, which may be wider than the weight's, that of the norm. On a CUDA device
    delta may be in parts, which gives the same bits as their sum, and `turn_T` is set to 0, where a later launch counts
    its programs.
    """
    if not h_TC.is_cuda:
        return reference.add_rms_norm(h_TC, delta_TC, weight_C, eps)
    from klquant.kernels.norm import triton

    return triton.add_rms_norm(h_TC, delta_TC, weight_C, eps, turn_T)


def gated_rms_norm(x: Tensor, gate: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / rms(x) · weight · sigmoid(gate) over the last dimension, in FP32 and rounded once to gate's dtype.

    x [.., D] in any dtype and gate [.., D], both contiguous: one launch.
    """
    if not x.is_cuda:
        return reference.gated_rms_norm(x, gate, weight_D, eps).to(gate.dtype)
    from klquant.kernels.norm import triton

    return triton.gated_rms_norm(x, gate, weight_D, eps)


def add_rms_norm_linear(
    h_TC: Tensor,
    delta_TC: Tensor | Parts | None,
    weight_C: Tensor,
    eps: float,
    proj_NC: Tensor,
    turn_T: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(h + delta, its norm, norm · projᵀ [T, N]) with a contiguous map in the norm's dtype: one launch for few tokens.

    Every program makes the norm anew, so the map has to be small. `turn_T` as in `add_rms_norm`.
    """
    crowded = isinstance(delta_TC, Parts) and delta_TC.beside_TC is not None
    if not h_TC.is_cuda or len(h_TC) > FEW_TOKENS or crowded:
        total_TC, normed_TC = add_rms_norm(h_TC, delta_TC, weight_C, eps, turn_T)
        return total_TC, normed_TC, F.linear(normed_TC, proj_NC)
    from klquant.kernels.norm import triton

    return triton.add_rms_norm_linear(h_TC, delta_TC, weight_C, eps, proj_NC, turn_T)
