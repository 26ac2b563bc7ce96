"""The norms in plain torch. Statistics are FP32 whatever the activations are."""

import torch
from torch import Tensor

# The two norms whose epsilon the config does not carry: the MLA latent's, and the L2 norm of KDA's q and k.
LATENT_EPS = 1e-6
L2_EPS = 1e-6


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) · weight over the last dimension, in weight's dtype; x's, to which the quotient is rounded, may be
    wider."""
    wide = widen(x)
    return (weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)).to(weight.dtype)


def add_rms_norm(h_TC: Tensor, delta_TC: Tensor | None, weight_C: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(h + delta, rms_norm(h + delta)) in h's and weight's dtype; without a delta h itself."""
    if delta_TC is not None:
        h_TC = h_TC + delta_TC
    return h_TC, rms_norm(h_TC, weight_C, eps)


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) · weight · sigmoid(gate), in FP32 to the end; the caller rounds."""
    x = widen(x)
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * widen(weight) * torch.sigmoid(widen(gate))


def l2_norm(x: Tensor) -> Tensor:
    """x / √(Σx² + ε) over the last dimension, in FP32."""
    x = widen(x)
    return x / torch.sqrt((x * x).sum(-1, keepdim=True) + L2_EPS)


def widen(x: Tensor) -> Tensor:
    """At least FP32; FP64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
