"""Two 8-bit codes of neighbouring latents in a 16-bit word, as exact 16-bit floats.

Codes are read as words because a tensor of bytes before a product makes Triton choose slow operand layouts, and are
unpacked two and two in a 32-bit register. E4M3 has its sign, four exponent bits with bias 7 and three of mantissa:
shifted to where a 16-bit float has them it is the value times a power of two, subnormal numbers included.
"""

import triton
import triton.language as tl

from klquant.kernels.bricks import _AND_OR, _constants, _twice, unpack


@triton.constexpr_function
def unit(format, dtype):
    """What `latents` makes of a code is the code divided by this."""
    return 256.0 if format == "fp8" and dtype == tl.float16 else 1.0


@triton.constexpr_function
def _fp8_asm(field, bf16):
    """PTX from two words ($1) to two codes ($0). Field 1 is the high byte, where the sign is in place."""
    lines = ["mov.b32 a, $1;" if field else "shl.b32 a, $1, 8;"]
    lines += [f"shr.u32 b, a, {4 if bf16 else 1};", f"lop3.b32 b, b, {_twice(0x07F0 if bf16 else 0x3F80)}, 0, 0xC0;"]
    lines += [f"lop3.b32 {'a' if bf16 else '$0'}, a, {_twice(0x8000)}, b, {_AND_OR};"]
    if bf16:  # the exponents' biases differ by 120
        lines += [f"fma.rn.bf16x2 $0, a, {_twice((127 + 120) << 7)}, {_twice(0x8000)};"]
    return "{ .reg .b32 a, b; " + " ".join(_constants(lines)) + " }"


@triton.jit
def latents(words, FORMAT: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """int16 words [T, L/2] → codes [T, L] in DTYPE, FP8 ones divided by `unit`; the even latents (low bytes) before the
    odd ones. FORMAT "plain": `words` are latents.
    """
    if FORMAT == "plain":
        return words
    else:
        pair = tl.join(_codes(words, 0, FORMAT, DTYPE, PTX), _codes(words, 1, FORMAT, DTYPE, PTX))
        return tl.reshape(tl.permute(pair, (0, 2, 1)), [words.shape[0], 2 * words.shape[1]])


@triton.jit
def _codes(words, FIELD: tl.constexpr, FORMAT: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """The low (0) or high (1) bytes of int16 `words` in DTYPE, FP8 ones divided by `unit`."""
    if FORMAT == "int8":
        # `unpack` takes codes + 128.
        return unpack(words ^ -32640, None, FIELD, 8, DTYPE, PTX).to(DTYPE)
    elif PTX:
        asm: tl.constexpr = _fp8_asm(FIELD, tl.bfloat16 == DTYPE)
        bits16 = tl.inline_asm_elementwise(asm, "=r,r", [words], dtype=tl.int16, is_pure=True, pack=2)
        return bits16.to(DTYPE, bitcast=True)
    else:
        byte = (words.to(tl.int32) >> (8 * FIELD)) & 0xFF
        bits = ((byte & 0x80) << 24) | ((byte & 0x7F) << 20)
        return (bits.to(tl.float32, bitcast=True) * (2.0**120 / unit(FORMAT, DTYPE))).to(DTYPE)
