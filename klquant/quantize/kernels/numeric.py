"""Rounding inside kernels, the same on every device and in Triton's interpreter."""

import triton
import triton.language as tl

# 1.5 · 2²³: adding it leaves no bits behind the point, so that subtracting it again has rounded half to even.
_INTEGERS = tl.constexpr(12582912.0)


@triton.jit
def round_between(x, low, high):
    """x rounded to the nearest integer (half to even) of [low, high]; both are integers well below 2²²."""
    return (tl.minimum(tl.maximum(x, low), high) + _INTEGERS) - _INTEGERS


@triton.jit
def round_bf16(x):
    """Finite FP32 x rounded to the nearest BF16 (half to even), as FP32."""
    bits = x.to(tl.int32, bitcast=True)
    bits += 0x7FFF + ((bits >> 16) & 1)
    return (bits & -65536).to(tl.float32, bitcast=True)
