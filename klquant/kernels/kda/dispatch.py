"""KDA's decode step as the engine sees it: Triton on a CUDA device, plain torch elsewhere."""

from torch import Tensor

from klquant.kernels.kda import reference
from klquant.kernels.kda.weights import KDADecode


def kda_decode(
    qkv: Tensor, low: Tensor, w: KDADecode, conv_pool: Tensor, s_pool: Tensor, slot_B: Tensor, eps: float
) -> Tensor:
    """All of a KDA layer between its projections, for one position a sequence: [B, F] in qkv's dtype, two launches.

    qkv [B, 3·F]: the three projections. low [B, ≥ 2·R + H]: f_a(x) ‖ g_a(x) ‖ b(x), rows may be strided.
    conv_pool [slots, 3·F, W − 1], qkv's dtype, and s_pool [slots, H, D, D] FP32 (key × value) are updated in place at
    slot_B [B] int32. Slots differ; a row whose slot is −1 is padding: its output is 0.
    """
    if not qkv.is_cuda:
        return reference.kda_decode(qkv, low, w, conv_pool, s_pool, slot_B, eps)
    from klquant.kernels.kda import triton

    return triton.kda_decode(qkv, low, w, conv_pool, s_pool, slot_B, eps)
