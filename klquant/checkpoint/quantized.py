"""The packed layout of a quantized weight, and the reader of quantized checkpoints.

A weight [N, K] with b bits and G groups a row is stored under its module's name, as compressed-tensors'
`pack-quantized` has it: `weight_packed` int32 [N, ceil(K·b/32)], `weight_scale` [N, G], `weight_shape` int64 [2] and,
when asymmetric, `weight_zero_point` int32 [ceil(N·b/32), G], packed along N.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from klquant.checkpoint.config import KimiLinearConfig
from klquant.checkpoint.index import CONFIG, FLOATS, raise_first, tensor_problems
from klquant.checkpoint.layout import packed_parts
from klquant.checkpoint.names import expected_tensors
from klquant.checkpoint.patterns import quantization_config
from klquant.checkpoint.reader import CheckpointReader
from klquant.checkpoint.scheme import Schemes, linear_modules
from klquant.core.grid import Quantized
from klquant.core.pack import pack, unpack
from klquant.core.spec import WeightSpec
from klquant.errors import UserError

__all__ = ["QuantizedReader", "compress", "decompress", "packed_layout", "quantization_config"]

SCALE_DTYPES = ("BF16", "F16", "F32")


def packed_layout(module: str, shape: tuple[int, int], spec: WeightSpec) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Names, dtypes and shapes of what `compress` makes of a weight [N, K], known before it is quantized.

    Raises UserError, naming the module, when the group does not divide K.
    """
    spec.groups(shape[1], module)
    return {f"{module}.{part.name}": (part.dtype, part.shape) for part in packed_parts(tuple(shape), spec)}


def compress(module: str, weight: Quantized) -> dict[str, Tensor]:
    """The stored tensors of one weight [N, K]; the bytes that compressed-tensors' own compressor makes."""
    assert weight.codes.ndim == 2, "one weight at a time: index a batch of experts first"
    tensors = {
        f"{module}.weight_packed": pack(weight.codes, weight.spec.bits),
        f"{module}.weight_scale": weight.scale.contiguous(),
        f"{module}.weight_shape": torch.tensor(weight.codes.shape, dtype=torch.int64),
    }
    if weight.zero is not None:
        columns = pack(weight.zero.T.contiguous(), weight.spec.bits)
        tensors[f"{module}.weight_zero_point"] = columns.T.contiguous()
    return tensors


def decompress(tensors: Mapping[str, Tensor], spec: WeightSpec) -> Quantized:
    """The inverse of `compress`. `tensors` by their own names (`weight_packed`, …) or with a module's before them."""
    parts = {name.rpartition(".")[2]: tensor for name, tensor in tensors.items()}
    n, k = parts["weight_shape"].tolist()
    return unpack_parts(parts["weight_packed"], parts["weight_scale"], parts.get("weight_zero_point"), spec, n, k)


def unpack_parts(
    packed: Tensor, scale: Tensor, zero_point: Tensor | None, spec: WeightSpec, n: int, k: int
) -> Quantized:
    """`Quantized` [.., N, K] of the stored tensors of one weight, or of several stacked, on their device."""
    zero = None
    if not spec.symmetric:
        zero = unpack(zero_point.mT.contiguous(), spec.bits, n).mT.contiguous()
    return Quantized(spec, unpack(packed, spec.bits, k), scale, zero)


@dataclass(frozen=True)
class QuantizedReader:
    """A checkpoint in 16 bits or pack-quantized (ours or another tool's), and a source of weights for the model.

    A quantized weight's value is code · scale rounded to the dtype of the scale, as compressed-tensors unpacks it.
    """

    files: CheckpointReader
    schemes: Schemes | None

    @classmethod
    def open(cls, folder: Path) -> "QuantizedReader":
        """Raises UserError on what CheckpointReader refuses, and on a quantization that klquant cannot read."""
        files = CheckpointReader.open(folder)
        raw = files.raw_config.get("quantization_config")
        schemes = None if raw is None else Schemes.from_config(raw, str(files.folder / CONFIG))
        return cls(files, schemes)

    @property
    def config(self) -> KimiLinearConfig:
        return self.files.config

    @cached_property
    def specs(self) -> dict[str, WeightSpec | None]:
        """Every weight matrix of the model: module → its grid, or None where it is stored as it is."""
        modules = linear_modules(self.config)
        if self.schemes is None:
            return dict.fromkeys(modules)
        return {module: self.schemes.spec(module, linear) for module, linear in modules.items()}

    @cached_property
    def expected(self) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
        """Every tensor the checkpoint must have: name → (dtypes allowed, shape), in file order."""
        table: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {}
        for name, shape in expected_tensors(self.config).items():
            module = name.removesuffix(".weight")
            if (spec := self.spec(module)) is None:
                table[name] = (FLOATS, shape)
                continue
            for part, (dtype, size) in packed_layout(module, shape, spec).items():
                table[part] = (SCALE_DTYPES if part.endswith("weight_scale") else (dtype,), size)
        return table

    def problems(self) -> list[str]:
        """One line for each tensor that is missing, unknown, or of a wrong shape or dtype."""
        shapes = {name: (info.dtype, info.shape) for name, info in self.files.tensors.items()}
        return list(tensor_problems(self.expected, shapes))

    def check_complete(self) -> None:
        """Raises UserError on the first of `problems`, and counts the others."""
        raise_first(self.problems(), str(self.files.folder))

    def spec(self, module: str) -> WeightSpec | None:
        """The grid of a module (hub name without `.weight`), or None where it is stored as it is."""
        return self.specs.get(module)

    def quantized(self, module: str, device: torch.device | str = "cpu") -> Quantized:
        """A module's codes and scales, checked and unpacked on `device`. Raises UserError when they are damaged."""
        spec = self.spec(module)
        assert spec is not None, f"{module} is not quantized"
        shape = self.shape(module)
        tensors = {}
        for name, (_, size) in packed_layout(module, shape, spec).items():
            info = self.files.info(name)
            if info.shape != size:
                raise UserError(f"{info.shard}: tensor {name} has shape {list(info.shape)}, expected {list(size)}")
            # The shape, two numbers, is asked for here.
            tensors[name] = self.files.read(name).to("cpu" if name.endswith("weight_shape") else device)
        self.check_values(f"{module}.weight_scale", tensors[f"{module}.weight_scale"])
        self.check_values(f"{module}.weight_shape", tensors[f"{module}.weight_shape"])
        return decompress(tensors, spec)

    def weight(self, name: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
        """A tensor by its full hub name, checked, dequantized where needed and converted to `dtype` on `device`."""
        module = name.removesuffix(".weight")
        if self.spec(module) is None:
            return self.files.weight(name, dtype, device)
        return self.quantized(module, device).values().to(dtype)

    def check_values(self, name: str, tensor: Tensor) -> None:
        """Raises UserError naming the tensor when its values cannot be right: NaN, a scale ≤ 0, another weight_shape.

        `tensor` holds all of it, or for floats any part.
        """
        self.files.require_finite(name, tensor)
        module, _, part = name.rpartition(".")
        if part == "weight_scale" and not bool((tensor > 0).all()):
            raise UserError(f"{self.files.info(name).shard}: tensor {name} holds a scale that is not positive")
        if part == "weight_shape" and tuple(tensor.tolist()) != self.shape(module):
            raise UserError(
                f"{self.files.info(name).shard}: tensor {name} says {tensor.tolist()}, "
                f"but {CONFIG} implies {list(self.shape(module))}"
            )

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return expected_tensors(self.config)

    def shape(self, module: str) -> tuple[int, ...]:
        """[N, K] of a module's weight."""
        return self._shapes[f"{module}.weight"]
