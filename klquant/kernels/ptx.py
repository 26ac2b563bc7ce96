"""PTX text of kernels that unpack two 16-bit halves of a register at once, and whether they may have any."""

import os

import triton

# Triton's interpreter knows no inline assembly.
PTX = os.environ.get("TRITON_INTERPRET") != "1"
AND_OR = "0xEA"  # lop3: (a & b) | c
ANDN_OR = "0xAE"  # lop3: (~a & b) | c
AND_XOR = "0x6A"  # lop3: (a & b) ^ c


@triton.constexpr_function
def twice(bits16):
    return f"0x{bits16:04X}{bits16:04X}"


@triton.constexpr_function
def block(lines):
    """`lines` as a statement, with registers a and b, and one for each packed immediate of `fma`, which takes none."""
    out, names = [], []
    for line in lines:
        if line.startswith("fma"):
            head, *operands = line.rstrip(";").split(", ")
            for i, operand in enumerate(operands):
                if operand.startswith("0x"):
                    name = f"c{len(names)}"
                    names.append(f".reg .b32 {name}; mov.b32 {name}, {operand};")
                    operands[i] = name
            line = ", ".join([head, *operands]) + ";"
        out.append(line)
    return "{ .reg .b32 a, b; " + " ".join(names + out) + " }"
