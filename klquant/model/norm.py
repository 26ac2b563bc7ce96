"""RMSNorm, plain and gated, and the L2 norm: what the kernels are checked against."""

from torch import Tensor

from klquant.kernels.norm import reference
from klquant.kernels.norm.dispatch import add_rms_norm
from klquant.kernels.norm.reference import L2_EPS, LATENT_EPS, gated_rms_norm, l2_norm, widen
from klquant.model import fused

__all__ = ["L2_EPS", "LATENT_EPS", "gated_rms_norm", "l2_norm", "rms_norm", "widen"]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) · weight over the last dimension, in weight's dtype; the quotient is rounded to x's first."""
    if not fused.serves(x):
        return reference.rms_norm(x, weight, eps)
    return add_rms_norm(x.flatten(0, -2), None, weight, eps)[1].view(x.shape)
