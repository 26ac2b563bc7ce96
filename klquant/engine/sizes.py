"""How many bytes the engine will hold of a model, known to the byte before any weight is read."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import lcm, prod

import torch

from klquant.checkpoint.config import KimiLinearConfig
from klquant.checkpoint.dtypes import DTYPES
from klquant.checkpoint.names import TensorClass, TensorKey, expected_tensors, parse_name
from klquant.checkpoint.quantized import QuantizedReader
from klquant.core.grid import SCALE_DTYPE, common_grid
from klquant.core.spec import WeightSpec
from klquant.kernels.linear.layout import ROW_MULTIPLE, packed_bytes, padded_inputs
from klquant.recipe.memory import WeightSizes

_GATE_UP = frozenset({"gate_proj", "up_proj", "w1", "w3"})
_MLP = frozenset({TensorClass.ROUTED_EXPERTS, TensorClass.SHARED_EXPERTS, TensorClass.DENSE_MLP})
# Matrices that kernels read plain.
PLAIN_ROLES = frozenset({"gate", "kv_b_proj", "f_b_proj", "g_b_proj"})
_FP32_ROLES = frozenset({"A_log", "dt_bias", "gate", "e_score_correction_bias"})


@dataclass(frozen=True)
class Outline:
    """Shapes and grids of a model without its weights. `specs`: weight matrix (hub name without `.weight`) → its grid,
    or None in 16 bits."""

    config: KimiLinearConfig
    specs: Mapping[str, WeightSpec | None]
    scale_dtype: torch.dtype = SCALE_DTYPE

    @classmethod
    def of(cls, reader: QuantizedReader) -> "Outline":
        """Of a checkpoint."""
        scale = next((info for name, info in reader.files.tensors.items() if name.endswith(".weight_scale")), None)
        return cls(reader.config, reader.specs, SCALE_DTYPE if scale is None else DTYPES[scale.dtype])

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor by its full hub name."""
        return expected_tensors(self.config)


def held_sizes(outline: Outline, dtype: torch.dtype, packed: bool = True) -> WeightSizes:
    """Bytes by place in the model that `build_weights` makes for activations of `dtype`."""
    return WeightSizes.of(held_bytes(outline, dtype, packed), outline.config.num_layers)


def held_bytes(outline: Outline, dtype: torch.dtype, packed: bool = True) -> dict[str, int]:
    """Tensor by its hub name → the bytes it takes in the engine."""
    keys = {name: parse_name(name, outline.config) for name in outline.shapes}
    joint = _joint_specs(outline, keys)
    found = {}
    for name, shape in outline.shapes.items():
        key = keys[name]
        if packed and key.cls in _MLP:
            found[name] = _mlp_bytes(outline, joint, key, shape)
        elif packed and key.is_matrix and key.role not in PLAIN_ROLES:
            found[name] = _bytes(outline, shape, outline.specs[key.module], dtype)
        else:
            found[name] = prod(shape) * (torch.float32 if key.role in _FP32_ROLES else dtype).itemsize
    return found


def _bytes(outline: Outline, shape: tuple[int, int], spec: WeightSpec | None, dtype: torch.dtype) -> int:
    if spec is None:
        return prod(shape) * dtype.itemsize
    return packed_bytes(spec, *shape, scale_bytes=outline.scale_dtype.itemsize)


def _place(key: TensorKey) -> tuple:
    """Weights that are held on one grid: gate and up, or down, of an MLP or of all experts of a layer."""
    return key.layer, key.cls, key.role in _GATE_UP


def _joint_specs(outline: Outline, keys: Mapping[str, TensorKey]) -> dict[tuple, WeightSpec | None]:
    specs: dict[tuple, set[WeightSpec | None]] = {}
    for key in keys.values():
        if key.cls in _MLP:
            specs.setdefault(_place(key), set()).add(outline.specs[key.module])
    return {place: None if None in found else common_grid(found) for place, found in specs.items()}


def _mlp_bytes(outline: Outline, joint: dict[tuple, WeightSpec | None], key: TensorKey, shape: tuple[int, int]) -> int:
    """One matrix of a packed MLP. Rows of gate and up are padded to what down takes (`pack_mlp`)."""
    rows = ROW_MULTIPLE
    if key.role in _GATE_UP:
        down = joint[key.layer, key.cls, False]
        rows = lcm(rows, padded_inputs(down, shape[0]))
    return packed_bytes(joint[_place(key)], *shape, scale_bytes=outline.scale_dtype.itemsize, row_multiple=rows)
