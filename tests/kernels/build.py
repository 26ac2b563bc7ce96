"""Random quantized weights, and the device that kernel tests run on."""

import torch
from torch import Tensor

from klquant.core.grid import Quantized
from klquant.core.spec import WeightSpec
from tests.triton_interpreter import interpreting

# The same tests run compiled where there is a GPU, and interpreted in a process of their own where there is none.
DEVICE = "cpu" if interpreting else "cuda"
can_run = interpreting or torch.cuda.is_available()


def random_weight(shape: tuple[int, ...], bits: int, group: int = 128, symmetric: bool = True) -> Quantized | Tensor:
    """A weight [(E,) N, K] whose product with unit inputs is of order one; 16 bits: a plain BF16 tensor."""
    *lead, k = shape
    if bits == 16:
        return (torch.randn(shape) / k**0.5).bfloat16()
    spec = WeightSpec(bits=bits, group_size=group, symmetric=symmetric)
    groups = (*lead, spec.groups(k))
    codes = torch.randint(spec.qmin, spec.qmax + 1, shape, dtype=torch.int8)
    scale = ((0.5 + torch.rand(groups)) / (spec.qmax * k**0.5)).bfloat16()
    zero = None if symmetric else torch.randint(spec.qmin, spec.qmax + 1, groups, dtype=torch.int8)
    return Quantized(spec, codes, scale, zero)


def exact(w: Quantized | Tensor) -> Tensor:
    """The weight's values in FP64."""
    return w.decode(torch.float64) if isinstance(w, Quantized) else w.double()


def error(y: Tensor, want: Tensor) -> float:
    """‖y − want‖ / ‖want‖."""
    y = y.cpu().double()
    return ((y - want).norm() / want.norm()).item()


# BF16 keeps 8 bits and FP16 11; the interpreter truncates where a GPU rounds, and an MLP rounds twice.
LIMIT = {torch.bfloat16: 6e-3, torch.float16: 8e-4}
