"""The norm in front of a mixer or an MLP with the sum before it, and KDA's: Triton on a CUDA device, else torch."""

from torch import Tensor

from klquant.kernels.norm import reference
from klquant.kernels.norm.parts import Parts


def add_rms_norm(
    h_TC: Tensor, delta_TC: Tensor | Parts | None, weight_C: Tensor, eps: float, turns: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(h + delta, rms_norm(h + delta)), each [T, C]: one launch. Without a delta the first is h itself.

    The sum is of h's dtype, which may be wider than the weight's, that of the norm. On a CUDA device delta may be in
    parts, which gives the same bits as their sum, and `turns` [T, a power of two] int32, in which later launches count
    their programs, are set to 0.
    """
    if not h_TC.is_cuda:
        return reference.add_rms_norm(h_TC, delta_TC, weight_C, eps)
    from klquant.kernels.norm import triton

    return triton.add_rms_norm(h_TC, delta_TC, weight_C, eps, turns)


def gated_rms_norm(x: Tensor, gate: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / rms(x) · weight · sigmoid(gate) over the last dimension, in FP32 and rounded once to gate's dtype.

    x [.., D] in any dtype and gate [.., D], both contiguous: one launch.
    """
    if not x.is_cuda:
        return reference.gated_rms_norm(x, gate, weight_D, eps).to(gate.dtype)
    from klquant.kernels.norm import triton

    return triton.gated_rms_norm(x, gate, weight_D, eps)
