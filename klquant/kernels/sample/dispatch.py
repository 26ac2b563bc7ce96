"""Drawing from a softmax as the engine sees it: Triton on a CUDA device, plain torch elsewhere.

Shape suffixes: B = rows, V = vocabulary, N = slots.
"""

from torch import Tensor

from klquant.kernels.sample import reference


def perturb(
    z_BV: Tensor, temperature_B: Tensor, seed_B: Tensor, position_B: Tensor, token_BV: Tensor | None = None
) -> Tensor:  # fmt: skip
    """z / temperature + Gumbel noise, FP32, whose largest is a draw from softmax(z / temperature): one launch.

    z [B, V] in any float dtype; temperature [B] FP32, rows at 0 stay as they are; seed [B] int64; position [B];
    token [B, V] int64 contiguous: which token each column is, None where they are in order. The noise of a token is a
    hash of (seed, position, token) and of nothing else.
    """
    if not z_BV.is_cuda:
        return reference.perturb(z_BV, temperature_B, seed_B, position_B, token_BV)
    from klquant.kernels.sample import triton

    return triton.perturb(z_BV, temperature_B, seed_B, position_B, token_BV)


def draw(
    z_BV: Tensor, temperature_N: Tensor | None, seed_N: Tensor, slot_B: Tensor, position_B: Tensor
) -> Tensor:  # fmt: skip
    """The column int64 [B] whose perturbed z is largest, the first of equals: two launches and no copy of z.

    Temperature and seed are those of `slot_B` int64; without a temperature nothing is perturbed. −1 where z holds a
    NaN or +∞, or nothing but −∞.
    """
    if not z_BV.is_cuda:
        return reference.draw(z_BV, temperature_N, seed_N, slot_B, position_B)
    from klquant.kernels.sample import triton

    return triton.draw(z_BV, temperature_N, seed_N, slot_B, position_B)
