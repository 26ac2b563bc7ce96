"""How many bytes a tensor takes on disk; a quantized one exactly as compressed-tensors' `pack-quantized` stores it.

Known before any weight is read, so that output shards can be laid out in advance, and without torch, so that a plan
costs no time. Shape suffixes: N = out features, K = in features, G = groups.
"""

from functools import lru_cache
from math import prod
from typing import NamedTuple

from klquant.core.spec import WeightSpec, packed_words

# Bytes an element, by safetensors' name of the dtype.
ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
SCALE = "BF16"


class Stored(NamedTuple):
    """One tensor of the output: `dtype` as safetensors spells it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes a tensor takes on disk."""
    return prod(shape) * ITEM_BYTES[dtype]


@lru_cache(maxsize=256)
def packed_parts(shape_NK: tuple[int, int], spec: WeightSpec) -> tuple[Stored, ...]:
    """What a weight becomes: packed codes, scales, shape and, if asymmetric, packed zero points. Names are suffixes.

    Codes fill whole 32-bit words along K (zero points along N), b bits each without gaps.
    """
    n, k = shape_NK
    groups = spec.groups(k)
    parts = [
        ("weight_packed", "I32", (n, packed_words(k, spec.bits))),
        ("weight_scale", SCALE, (n, groups)),
        ("weight_shape", "I64", (2,)),
    ]
    if not spec.symmetric:
        parts.append(("weight_zero_point", "I32", (packed_words(n, spec.bits), groups)))
    return tuple(Stored(suffix, dtype, shape, nbytes(dtype, shape)) for suffix, dtype, shape in parts)
