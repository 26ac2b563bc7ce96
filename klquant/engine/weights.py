"""What the engine holds of a model. Shape suffixes as in `klquant.model.weights`; W = taps of a short convolution.

Every weight is held once. `EngineLayer.fused` is the mixer as the engine runs it: maps that read the same input lie in
one weight below each other. `EngineLayer.model` is the layer as `klquant.model` runs it, its maps row views of those.

On a GPU quantized weights stay packed (`QuantLinear`, `QuantMLP`, `QuantExperts`), routed experts, shared experts and
dense MLPs are packed whatever their bits, and other 16-bit matrices are plain tensors for `torch`'s own product. On a
CPU all of them are plain FP32 tensors as long as memory lasts: the reference path would otherwise unpack every weight
again at every token.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass

import torch
from torch import Tensor

from klquant.checkpoint.config import KimiLinearConfig
from klquant.model.forward import Head
from klquant.model.weights import LayerWeights, Linear, linear


@dataclass(frozen=True)
class Stacked:
    """Linear maps of one input whose outputs follow one another, where one packed weight cannot hold them all."""

    parts: tuple[Linear, ...]

    @property
    def shape(self) -> tuple[int, int]:
        return sum(p.shape[0] for p in self.parts), self.parts[0].shape[1]

    def __call__(self, x: Tensor) -> Tensor:
        """x [.., K] → [.., N]."""
        return torch.cat([linear(x, part) for part in self.parts], -1)


@dataclass(frozen=True)
class FusedKDA:
    """A KDA mixer.

    qkv [3F, C]: q, k, v. low [2D + H, C]: f_a, g_a, b. taps_FW [3F, W]: the convolutions of q, k, v, contiguous.
    A_log [H] and dt_bias [F] FP32. f_b, g_b [F, D]: always plain, for a step's kernel reads them.
    o_norm [D]; o_proj [C, F].
    """

    qkv: Linear
    low: Linear
    taps_FW: Tensor
    A_log: Tensor
    dt_bias: Tensor
    f_b: Tensor
    g_b: Tensor
    o_norm: Tensor
    o_proj: Linear


@dataclass(frozen=True)
class FusedMLA:
    """An MLA mixer.

    q_kv_a [H·qk + L, C]: q, then the latent and the shared key part. kv_a_norm [kv_rank]. kv_b [H·(nope + v), kv_rank]:
    always plain, for absorbed attention reads it both ways. o_proj [C, H·v].
    """

    q_kv_a: Linear
    kv_a_norm: Tensor
    kv_b: Tensor
    o_proj: Linear


@dataclass(frozen=True)
class EngineLayer:
    """One layer, whole on one device. The MLP and the norms are those of `model`."""

    model: LayerWeights
    fused: FusedKDA | FusedMLA

    @property
    def device(self) -> torch.device:
        return self.model.input_norm.device


@dataclass(frozen=True)
class EngineWeights:
    """A whole model. The embedding [V, C] may be on the CPU (pinned); the head is on the last layer's device.

    `notes` says, a line each, what is held otherwise than it is stored, to be shown to the user.
    """

    cfg: KimiLinearConfig
    embedding_VC: Tensor
    layers: tuple[EngineLayer, ...]
    head: Head
    notes: tuple[str, ...] = ()

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations."""
        return self.head.norm.dtype

    @property
    def devices(self) -> list[torch.device]:
        """Of the layers, in order."""
        return list(dict.fromkeys(layer.device for layer in self.layers))

    def nbytes(self) -> dict[torch.device, int]:
        """Bytes held on each device, the embedding's included."""
        return storage_bytes(self)


def storage_bytes(*holders: object) -> dict[torch.device, int]:
    """Bytes by device of all tensors in dataclasses, tuples, lists and dicts' values, shared storage counted once."""
    seen = {}
    for tensor in _tensors(holders):
        storage = tensor.untyped_storage()
        seen[storage._cdata] = tensor.device, storage.nbytes()
    total: dict[torch.device, int] = {}
    for device, size in seen.values():
        total[device] = total.get(device, 0) + size
    return total


def _tensors(holder: object) -> Iterator[Tensor]:
    if isinstance(holder, Tensor):
        yield holder
    elif isinstance(holder, tuple | list | dict):
        for item in holder.values() if isinstance(holder, dict) else holder:
            yield from _tensors(item)
    elif is_dataclass(holder):
        for field in fields(holder):
            yield from _tensors(getattr(holder, field.name))
