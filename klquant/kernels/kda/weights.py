"""What a KDA layer needs between its projections.

Shape suffixes of `klquant.kernels.kda`: B = sequences, H = heads, D = head size, F = H·D, W = taps of a convolution,
S = positions of a chunk, R = width of the gates' bottleneck.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class KDADecode:
    """taps [3·F, W] of q, k and v; A_log [H] and dt_bias [F] FP32; f_b and g_b [F, R]; o_norm [D].

    All but the two FP32 tensors are in 16 bits on a GPU.
    """

    taps: Tensor
    A_log: Tensor
    dt_bias: Tensor
    f_b: Tensor
    g_b: Tensor
    o_norm: Tensor
