"""Where the model takes kernels instead of plain torch."""

import torch
from torch import Tensor

from klquant.core.packages import is_installed


def serves(x: Tensor) -> bool:
    """Whether kernels of `klquant.kernels` work on activations `x`: 16 bits on a CUDA device, and no gradient wanted.

    Their results are those of plain torch up to the rounding of 16 bits. FP32 is never theirs.
    """
    half = x.dtype in (torch.bfloat16, torch.float16)
    return x.is_cuda and half and not torch.is_grad_enabled() and is_installed("triton")
