"""What a card can do that tiles and launches depend on."""

import torch
from torch import Tensor


def starts_early(x: Tensor) -> bool:
    """Whether a launch on x's device can start while the one before it works: programmatic dependent launch, sm90."""
    return x.is_cuda and torch.cuda.get_device_properties(x.device).major >= 9


def has_wgmma(x: Tensor) -> bool:
    """Whether x's device multiplies by `wgmma`, whose sums of 128 × 128 leave four warps registers to spare: Hopper."""
    return x.is_cuda and torch.cuda.get_device_properties(x.device).major == 9
