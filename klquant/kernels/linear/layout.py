"""The kernels' own weight layout, and the way from codes on a grid to it and back.

Shape suffixes: N = out features, K = in features, G = groups, E = experts.

A weight is cut into *bricks* of 16 rows × 32·C inputs. A brick is 16 rows × 32 words of 16 bits, so 1 KiB (INT3: 1.5)
of contiguous memory that one warp reads with 16-byte loads, and word j of a row holds C codes: field i of it is the
code of input 32·i + j. A matrix product does not care about the order of K, so the kernels never transpose: masking
field i of all words gives 32 neighbouring inputs, in the register layout of a plain [N, 32] 16-bit operand.

| bits | C | word                                                                | a brick covers |
|   4  | 4 | four codes + 8, four bits each                                      | 128 inputs     |
|   8  | 2 | two codes + 128, a byte each                                        | 64 inputs      |
|   3  | 8 | eight codes + 4: their low two bits; the high bits in a byte beside | 256 inputs     |
|  16  | 1 | a BF16 value, no scale                                              | 32 inputs      |

INT3 as ten codes in 32 bits would cost 3.2 bits; two planes cost exactly 3, and both keep the word arithmetic of INT4.
Chunks of 32 inputs divide every group size, so a chunk has one scale. Scales (and zero points) lie [N/16, G, 16]: what
a brick needs is 32 contiguous bytes. N is padded with rows whose scale is 0, K with codes that meet inputs of 0.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from klquant.core.grid import Quantized, decode
from klquant.core.spec import WHOLE_ROW, WeightSpec

ROWS = 16
CHUNK = 32
# Codes a word holds.
FIELDS = {3: 8, 4: 4, 8: 2, 16: 1}
# Rows come in multiples of the largest tile that every shape of the model is a multiple of.
ROW_MULTIPLE = 64
# What a kernel subtracts from codes, exactly; bytes would cost it a wider operand layout.
ZERO_DTYPE = torch.bfloat16
# Codes repacked at once: bounds the temporaries to some hundred MB.
CODES_AT_ONCE = 1 << 26


def brick_inputs(bits: int) -> int:
    """Inputs that one brick covers."""
    return CHUNK * FIELDS[bits]


@dataclass(frozen=True)
class Packed:
    """A weight [N, K], or E of them, as the kernels read it. `spec` is None for 16-bit weights.

    words int16 [(E,) NB, KB, 16, 32]; high int8 of the same shape (INT3) or None; scale in its stored dtype and zero
    BF16 [(E,) NB, G, 16], or None. NB, KB count bricks; N and K are the sizes without padding.
    """

    spec: WeightSpec | None
    n: int
    k: int
    words: Tensor
    high: Tensor | None = None
    scale: Tensor | None = None
    zero: Tensor | None = None

    @property
    def bits(self) -> int:
        return 16 if self.spec is None else self.spec.bits

    @property
    def group(self) -> int:
        """Inputs that share a scale, 0 when a whole row does or there is none."""
        return 0 if self.spec is None or self.spec.group_size == WHOLE_ROW else self.spec.group_size

    @property
    def experts(self) -> int | None:
        return self.words.shape[0] if self.words.dim() == 5 else None

    @property
    def row_bricks(self) -> int:
        return self.words.shape[-4]

    @property
    def bricks(self) -> int:
        """Bricks along K."""
        return self.words.shape[-3]

    @property
    def groups(self) -> int:
        return 1 if self.scale is None else self.scale.shape[-2]

    @property
    def k_padded(self) -> int:
        return self.bricks * brick_inputs(self.bits)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.words, self.high, self.scale, self.zero

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors if t is not None)

    def to(self, device: torch.device | str) -> "Packed":
        return self.map(lambda t: t.to(device))

    def __getitem__(self, expert: int | slice) -> "Packed":
        return self.map(lambda t: t[expert])

    def rows(self, start: int, stop: int) -> "Packed":
        """Rows [start, stop) of a weight [N, K], as views. `start` is a multiple of ROW_MULTIPLE.

        What fills the last tile are the rows that follow; a kernel computes them and stores `stop - start`.
        """
        assert start % ROW_MULTIPLE == 0 and 0 <= start < stop <= self.n, (start, stop, self.n)
        first, last = start // ROWS, -(-stop // ROW_MULTIPLE) * ROW_MULTIPLE // ROWS
        return replace(self.map(lambda t: t[first:last]), n=stop - start)

    def map(self, change: Callable[[Tensor], Tensor]) -> "Packed":
        """The same weight with every tensor changed."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: change(t) for name, t in tensors.items() if isinstance(t, Tensor)})


def pack(w: Quantized, row_multiple: int = ROW_MULTIPLE) -> Packed:
    """Codes [(E,) N, K] on their grid → the kernels' layout, on the same device. Experts are packed a few at a time."""
    *lead, n, k = w.codes.shape
    if lead:
        step = max(1, CODES_AT_ONCE // (n * k))
        parts = [_pack(w[i : i + step], n, k, row_multiple) for i in range(0, lead[0], step)]
        return _cat(parts) if len(parts) > 1 else parts[0]
    return _pack(w, n, k, row_multiple)


def _cat(parts: list[Packed]) -> Packed:
    columns = zip(*(p.tensors for p in parts), strict=True)
    tensors = [None if column[0] is None else torch.cat(column) for column in columns]
    return replace(parts[0], **dict(zip(("words", "high", "scale", "zero"), tensors, strict=True)))


def _pack(w: Quantized, n: int, k: int, row_multiple: int) -> Packed:
    bits, inputs = w.spec.bits, brick_inputs(w.spec.bits)
    codes = _pad(w.codes, -n % row_multiple, -k % inputs)
    # [..., NB, 16, KB, C, 32] → [..., NB, KB, 16, C, 32]
    codes = codes.unflatten(-1, (-1, FIELDS[bits], CHUNK)).unflatten(-4, (-1, ROWS)).transpose(-4, -3)
    width = 16 // FIELDS[bits]
    words = torch.zeros_like(codes[..., 0, :], dtype=torch.int16)
    high = torch.zeros_like(words, dtype=torch.uint8) if bits == 3 else None
    for i in range(FIELDS[bits]):
        unsigned = codes[..., i, :].to(torch.int16) + (1 << (bits - 1))
        words |= (unsigned & ((1 << width) - 1)) << (width * i)
        if high is not None:
            high |= ((unsigned >> width) << i).to(torch.uint8)
    return Packed(
        w.spec, n, k, words.contiguous(), None if high is None else high.contiguous().view(torch.int8),
        _pack_groups(w.scale, w.spec, k, row_multiple),
        None if w.zero is None else _pack_groups(w.zero.to(ZERO_DTYPE), w.spec, k, row_multiple),
    )  # fmt: skip


def pack_plain(w: Tensor, row_multiple: int = ROW_MULTIPLE) -> Packed:
    """A 16-bit weight [(E,) N, K], stored as BF16, in the kernels' layout."""
    *_, n, k = w.shape
    padded = _pad(w.bfloat16(), -n % row_multiple, -k % CHUNK)
    words = padded.unflatten(-1, (-1, CHUNK)).unflatten(-3, (-1, ROWS)).transpose(-3, -2)
    return Packed(None, n, k, words.contiguous().view(torch.int16))


def padded_inputs(spec: WeightSpec | None, k: int) -> int:
    """Inputs of a weight [N, K] in whole bricks. `spec` None: 16 bits."""
    inputs = brick_inputs(16 if spec is None else spec.bits)
    return -(-k // inputs) * inputs


def packed_bytes(
    spec: WeightSpec | None, n: int, k: int, scale_bytes: int = 2, row_multiple: int = ROW_MULTIPLE
) -> int:
    """`nbytes` of a weight [N, K] packed, without packing it. `scale_bytes`: of one scale."""
    rows, inputs = -(-n // row_multiple) * row_multiple, padded_inputs(spec, k)
    if spec is None:
        return rows * inputs * 2
    groups = 1 if spec.group_size == WHOLE_ROW else -(-inputs // spec.group_size)
    zero_bytes = 0 if spec.symmetric else ZERO_DTYPE.itemsize
    return rows * (inputs * spec.bits // 8 + groups * (scale_bytes + zero_bytes))


def interleave(gate: Packed, up: Packed) -> Packed:
    """One weight of `gate`'s and `up`'s rows, sixteen by sixteen in turn: what makes silu(gate) · up one kernel.

    Its `n` counts padded rows, so that 16 rows of activations belong to every 32 of it.
    """
    pairs = zip(gate.tensors, up.tensors, (-4, -4, -3, -3), strict=True)
    tensors = [None if g is None else torch.stack((g, u), dim).flatten(dim - 1, dim) for g, u, dim in pairs]
    named = dict(zip(("words", "high", "scale", "zero"), tensors, strict=True))
    return replace(gate, n=2 * gate.row_bricks * ROWS, **named)


def split_rows(w_NK: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Values [(E,) N, K] of an interleaved weight → the first `n` rows of gate and of up."""
    pairs = w_NK.unflatten(-2, (-1, 2, ROWS))
    return pairs[..., 0, :, :].flatten(-3, -2)[..., :n, :], pairs[..., 1, :, :].flatten(-3, -2)[..., :n, :]


def unpack(w: Packed) -> Quantized:
    """The inverse of `pack`."""
    bits = w.bits
    width = 16 // FIELDS[bits]
    fields_ = [(w.words >> (width * i)) & ((1 << width) - 1) for i in range(FIELDS[bits])]
    if w.high is not None:
        fields_ = [f | ((w.high.to(torch.int16) >> i) & 1) << width for i, f in enumerate(fields_)]
    codes = (torch.stack(fields_, -2) - (1 << (bits - 1))).to(torch.int8)
    codes = codes.transpose(-4, -3).flatten(-3).flatten(-3, -2)[..., : w.n, : w.k]
    groups = w.spec.groups(w.k)
    scale, zero = (
        None if t is None else t.transpose(-1, -2).flatten(-3, -2)[..., : w.n, :groups] for t in w.tensors[2:]
    )
    return Quantized(w.spec, codes, scale, None if zero is None else zero.to(torch.int8))


def values(w: Packed, dtype: torch.dtype) -> Tensor:
    """The weight [(E,) N, K] that `w` stands for, in `dtype`."""
    if w.spec is None:
        rows = w.words.view(torch.bfloat16).transpose(-3, -2)
        return rows.flatten(-2).flatten(-3, -2)[..., : w.n, : w.k].to(dtype)
    q = unpack(w)
    return decode(q.codes, q.scale, q.zero, q.spec, dtype)


def _pad(x: Tensor, rows: int, columns: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, columns, 0, rows)) if rows or columns else x


def _pack_groups(x_NG: Tensor, spec: WeightSpec, k: int, row_multiple: int) -> Tensor:
    """[..., N, G] → [..., N/16, G, 16], with as many groups as the padded inputs have."""
    if spec.group_size == WHOLE_ROW:
        columns = 0
    else:
        padded = k + -k % brick_inputs(spec.bits)
        columns = -(-padded // spec.group_size) - x_NG.shape[-1]
    padded_NG = _pad(x_NG, -x_NG.shape[-2] % row_multiple, columns)
    return padded_NG.unflatten(-2, (-1, ROWS)).transpose(-1, -2).contiguous()
