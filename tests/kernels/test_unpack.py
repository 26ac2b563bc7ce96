"""The PTX that unpacks words, run by a small emulator: a GPU gives the same bits as the layout says."""

import re

import pytest
import torch

from klquant.kernels.linear.layout import FIELDS
from tests.triton_interpreter import interpreting, needs_triton

pytestmark = [needs_triton, pytest.mark.skipif(interpreting, reason="once is enough")]
BITS32 = 0xFFFFFFFF


def emulate(asm: str, dtype: torch.dtype, **registers: torch.Tensor) -> torch.Tensor:
    """The 32-bit registers (int64 tensors) after the PTX in `asm`; returns $0."""
    registers = {"$" + name[1:]: value for name, value in registers.items()}

    def read(operand: str) -> torch.Tensor:
        return torch.tensor(int(operand, 0)) if re.match(r"\d", operand) else registers[operand]

    def halves(x: torch.Tensor) -> torch.Tensor:
        pair = torch.stack((x & 0xFFFF, x >> 16), -1)
        return torch.where(pair < 0x8000, pair, pair - 0x10000).to(torch.int16).view(dtype).double()

    for line in asm.strip("{} ").split(";"):
        op, _, rest = line.strip().partition(" ")
        if not op or op == ".reg":
            continue
        target, *operands = rest.split(", ")
        a, b, c, table = (*map(read, operands), *[None] * (4 - len(operands)))
        if op == "mov.b32":
            out = a
        elif op == "shr.u32":
            out = a >> b
        elif op == "shl.b32":
            out = (a << b) & BITS32
        elif op == "lop3.b32":
            minterms = ((a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c) for i in range(8))
            chosen = [m & BITS32 for i, m in enumerate(minterms) if table >> i & 1]
            out = sum(chosen)
        else:
            assert op == {torch.bfloat16: "fma.rn.bf16x2", torch.float16: "fma.rn.f16x2"}[dtype], op
            rounded = (halves(a) * halves(b) + halves(c)).to(dtype)
            pair = rounded.view(torch.int16).to(torch.int64) & 0xFFFF
            out = pair[..., 0] | pair[..., 1] << 16
        registers[target] = out
    return registers["$0"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_ptx_unpacks_every_code(bits, dtype):
    from klquant.kernels.bricks import unpack_asm

    torch.manual_seed(0)
    width = 16 // FIELDS[bits]
    words = torch.randint(0, 1 << 16, (4096, 2))
    high = torch.randint(0, 1 << 8, (4096, 2))
    # A byte widened with its sign, as the kernel does.
    widened = torch.where(high < 0x80, high, high | 0xFF00)
    for field in range(FIELDS[bits]):
        code = (words >> (width * field)) & ((1 << width) - 1)
        if bits == 3:
            code |= ((high >> field) & 1) << width
        pack = words[:, 0] | words[:, 1] << 16
        beside = widened[:, 0] | widened[:, 1] << 16
        out = emulate(unpack_asm(bits, field, dtype == torch.bfloat16), dtype, r1=pack, r2=beside)
        pair = torch.stack((out & 0xFFFF, out >> 16), -1)
        values = torch.where(pair < 0x8000, pair, pair - 0x10000).to(torch.int16).view(dtype)
        assert torch.equal(values.long(), code - (1 << (bits - 1)))
        assert len(code.unique()) == 1 << bits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_ptx_unpacks_every_latent(format, dtype):
    from klquant.kernels.mla.words import code_asm

    torch.manual_seed(0)
    words = torch.randint(0, 1 << 16, (4096, 2))
    unit = 256 if (format, dtype) == ("fp8", torch.float16) else 1
    for field in (0, 1):
        byte = ((words >> (8 * field)) & 0xFF).to(torch.uint8)
        want = byte.view(torch.float8_e4m3fn if format == "fp8" else torch.int8).float()
        out = emulate(code_asm(format, field, dtype == torch.bfloat16), dtype, r1=words[:, 0] | words[:, 1] << 16)
        pair = torch.stack((out & 0xFFFF, out >> 16), -1)
        values = torch.where(pair < 0x8000, pair, pair - 0x10000).to(torch.int16).view(dtype).float()
        numbers = ~want.isnan()
        assert torch.equal(values[numbers] * unit, want[numbers])
        assert len(want[numbers].unique()) == {"fp8": 253, "int8": 256}[format]
