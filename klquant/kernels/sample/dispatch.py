"""Drawing from a softmax as the engine sees it: Triton on a CUDA device, plain torch elsewhere.

Shape suffixes: B = rows, V = vocabulary, N = slots.
"""

from torch import Tensor

from klquant.kernels.sample import reference


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


def draw_narrowed(
    z_BV: Tensor, seen_NV: Tensor, temperature_N: Tensor, top_k_N: Tensor, top_p_N: Tensor, min_p_N: Tensor,
    penalty_N: Tensor, seed_N: Tensor, slot_B: Tensor, position_B: Tensor,
) -> Tensor:  # fmt: skip
    """`draw` from what is left of z behind the penalty of tokens seen, then top-k, top-p and min-p: column int64 [B].

    seen [N, V] bool, in which the token is noted; top_k int64, V or more for all; top_p 1 for all; min_p 0, penalty 1:
    none. All are [N], read at `slot_B` int64. Of equal logits the first come first. The likeliest token always stays.
    Twenty launches, without sorting.
    """
    if not z_BV.is_cuda:
        return reference.draw_narrowed(
            z_BV, seen_NV, temperature_N, top_k_N, top_p_N, min_p_N, penalty_N, seed_N, slot_B, position_B
        )
    from klquant.kernels.sample import narrow

    return narrow.draw_narrowed(
        z_BV, seen_NV, temperature_N, top_k_N, top_p_N, min_p_N, penalty_N, seed_N, slot_B, position_B
    )
