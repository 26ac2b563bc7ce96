"""Where a pass gets its weights from: a checkpoint, one that is rounded as it is read, or a mixture of two."""

from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from klquant.checkpoint.config import KimiLinearConfig
from klquant.checkpoint.quantized import QuantizedReader


class Source(Protocol):
    """A source of weights for the model (`klquant.model.weights.WeightSource`); `name` is what messages call it."""

    @property
    def name(self) -> str: ...

    @property
    def config(self) -> KimiLinearConfig: ...

    def weight(self, name: str, dtype: torch.dtype) -> Tensor: ...


@dataclass(frozen=True)
class DeviceSource:
    """Weights of a checkpoint on the device, checked and dequantized there: a GPU does that beside reading them."""

    reader: QuantizedReader
    device: torch.device

    @property
    def name(self) -> str:
        return str(self.reader.files.folder)

    @property
    def config(self) -> KimiLinearConfig:
        return self.reader.config

    def weight(self, name: str, dtype: torch.dtype) -> Tensor:
        return self.reader.weight(name, dtype, self.device)


# A weight matrix [N, K] by its hub name → its value after quantizing and dequantizing it.
Rounding = Callable[[str, Tensor], Tensor]


@dataclass(frozen=True)
class Rounded:
    """Every matrix of a 16-bit checkpoint, rounded on the device as it is read."""

    reader: QuantizedReader
    rounding: Rounding
    device: torch.device
    name: str

    @property
    def config(self) -> KimiLinearConfig:
        return self.reader.config

    def weight(self, name: str, dtype: torch.dtype) -> Tensor:
        stored = self.reader.files.read(name).to(self.device)
        self.reader.files.require_finite(name, stored)
        return self.rounding(name, stored).to(dtype)


@dataclass(frozen=True)
class Mixed:
    """The tensors `names` (hub names) of `other`, all others of `base`."""

    base: Source
    other: Source
    names: Set[str]
    name: str

    @property
    def config(self) -> KimiLinearConfig:
        return self.base.config

    def weight(self, name: str, dtype: torch.dtype) -> Tensor:
        return (self.other if name in self.names else self.base).weight(name, dtype)
