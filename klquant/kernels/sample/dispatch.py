"""Drawing from a softmax as the engine sees it: Triton on a CUDA device, plain torch elsewhere.

Shape suffixes: B = rows, V = vocabulary.
"""

from torch import Tensor

from klquant.kernels.sample import reference


def perturb(
    z_BV: Tensor, temperature_B: Tensor, seed_B: Tensor, position_B: Tensor, token_BV: Tensor | None = None
) -> Tensor:  # fmt: skip
    """z / temperature + Gumbel noise, FP32, whose largest is a draw from softmax(z / temperature): one launch.

    z [B, V] in any float dtype; temperature [B] FP32, rows at 0 are left as they are; seed and position [B] int64;
    token [B, V] int64 contiguous: which token each column is, None where they are in order. The noise of a token is a
    hash of (seed, position, token) and of nothing else.
    """
    if not z_BV.is_cuda:
        return reference.perturb(z_BV, temperature_B, seed_B, position_B, token_BV)
    from klquant.kernels.sample import triton

    return triton.perturb(z_BV, temperature_B, seed_B, position_B, token_BV)
