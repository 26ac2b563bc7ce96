"""RMSNorm, plain and gated, and the L2 norm: what the kernels are checked against."""

from klquant.kernels.norm.reference import L2_EPS, LATENT_EPS, gated_rms_norm, l2_norm, rms_norm, widen

__all__ = ["L2_EPS", "LATENT_EPS", "gated_rms_norm", "l2_norm", "rms_norm", "widen"]
