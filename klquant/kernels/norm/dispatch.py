"""The norm in front of a mixer or an MLP, and the sum before it: Triton on a CUDA device, plain torch elsewhere."""

from torch import Tensor

from klquant.kernels.norm import reference


def add_rms_norm(h_TC: Tensor, delta_TC: Tensor | None, weight_C: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(h + delta, rms_norm(h + delta)), each [T, C] in h's dtype: one launch. Without a delta the first is h itself."""
    if not h_TC.is_cuda:
        return reference.add_rms_norm(h_TC, delta_TC, weight_C, eps)
    from klquant.kernels.norm import triton

    return triton.add_rms_norm(h_TC, delta_TC, weight_C, eps)
