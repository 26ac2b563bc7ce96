"""Two 8-bit codes of neighbouring latents in a 16-bit word, as exact 16-bit floats.

Codes are read as words because a tensor of bytes before a product makes Triton choose slow operand layouts, and are
unpacked two and two in a 32-bit register. INT8 codes go through floats that have integers in their low bits, as in
`klquant.kernels.bricks`, but with their signs: BF16 has room for seven bits, and subtracts 128, or 256 where the eighth
is set. E4M3 has its sign, four exponent bits with bias 7 and three of mantissa:
shifted to where a 16-bit float has them it is the value times a power of two, subnormal numbers included.
"""

import triton
import triton.language as tl

from klquant.kernels.ptx import AND_OR, AND_XOR, block, twice


@triton.constexpr_function
def unit(format, dtype):
    """What `latents` makes of a code is the code divided by this."""
    return 256.0 if format == "fp8" and dtype == tl.float16 else 1.0


@triton.constexpr_function
def code_asm(format, field, bf16):
    """PTX from two words ($1) to their codes of `field` ($0), FP8 ones divided by `unit`."""
    return _int8_asm(field, bf16) if format == "int8" else _fp8_asm(field, bf16)


@triton.constexpr_function
def _int8_asm(field, bf16):
    lines = ["shr.u32 a, $1, 8;" if field else "mov.b32 a, $1;"]
    if bf16:
        lines += [f"lop3.b32 b, a, {twice(0x80)}, {twice(0x4300)}, {AND_OR};"]
        lines += [f"lop3.b32 a, a, {twice(0x7F)}, {twice(0x4300)}, {AND_OR};"]
        lines += [f"fma.rn.bf16x2 $0, b, {twice(0xBF80)}, a;"]
    else:
        lines += [f"lop3.b32 a, a, {twice(0xFF)}, {twice(0x6480)}, {AND_XOR};"]
        lines += [f"fma.rn.f16x2 $0, a, {twice(0x3C00)}, {twice(0xE480)};"]
    return block(lines)


@triton.constexpr_function
def _fp8_asm(field, bf16):
    """Field 1 is the high byte, where the sign is in place."""
    lines = ["mov.b32 a, $1;" if field else "shl.b32 a, $1, 8;"]
    lines += [f"shr.u32 b, a, {4 if bf16 else 1};", f"lop3.b32 b, b, {twice(0x07F0 if bf16 else 0x3F80)}, 0, 0xC0;"]
    lines += [f"lop3.b32 {'a' if bf16 else '$0'}, a, {twice(0x8000)}, b, {AND_OR};"]
    if bf16:  # the exponents' biases differ by 120
        lines += [f"fma.rn.bf16x2 $0, a, {twice((127 + 120) << 7)}, {twice(0x8000)};"]
    return block(lines)


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
    if PTX:
        asm: tl.constexpr = code_asm(FORMAT, FIELD, tl.bfloat16 == DTYPE)
        bits16 = tl.inline_asm_elementwise(asm, "=r,r", [words], dtype=tl.int16, is_pure=True, pack=2)
        return bits16.to(DTYPE, bitcast=True)
    elif FORMAT == "int8":
        return ((words << (8 - 8 * FIELD)) >> 8).to(tl.float32).to(DTYPE)
    else:
        return (e4m3(words.to(tl.int32) >> (8 * FIELD)) / unit(FORMAT, DTYPE)).to(DTYPE)


@triton.jit
def e4m3(bits):
    """FP32 of the E4M3 code in the low byte of int32 `bits`."""
    # Its exponent and mantissa where FP32 has them, biases 120 apart; subnormal numbers come out right.
    moved = ((bits & 0x80) << 24) | ((bits & 0x7F) << 20)
    return moved.to(tl.float32, bitcast=True) * 2.0**120
