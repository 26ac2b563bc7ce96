"""KDA between its projections as the engine sees it: Triton on a CUDA device, plain torch elsewhere."""

from torch import Tensor

from klquant.kernels.card import starts_early
from klquant.kernels.kda import reference
from klquant.kernels.kda.borders import Borders
from klquant.kernels.kda.tiles import decode_tile
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

    return triton.kda_decode(qkv, low, w, conv_pool, s_pool, slot_B, eps, decode_tile(starts_early(qkv)))


def prefill_inputs(
    qkv_BSF: Tensor, b_BSH: Tensor, taps_FW: Tensor, tail_BFW: Tensor | None, borders: Borders | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """What the delta rule of S positions of B sequences reads: (q, k, v [B, S, H, D] in qkv's dtype, β [B, S, H] FP32).

    qkv [B, S, 3·F]: the three projections; b [B, S, H]; rows of both may be strided. taps [3·F, W]. q, k and v are
    convolved and passed through SiLU, q and k then l2-normed, each rounded to qkv's dtype; β = sigmoid(b). tail
    [B, 3·F, W − 1], qkv's dtype, contiguous: the inputs before the first position, replaced by the last ones; None:
    zeros, and the last ones are not kept. With borders the S positions are those of sequences one behind the other,
    and B is 1 but for the tails; of padding all is 0. One launch.
    """
    if not qkv_BSF.is_cuda:
        return reference.prefill_inputs(qkv_BSF, b_BSH, taps_FW, tail_BFW, borders)
    from klquant.kernels.kda import prefill

    return prefill.prefill_inputs(qkv_BSF, b_BSH, taps_FW, tail_BFW, borders)
