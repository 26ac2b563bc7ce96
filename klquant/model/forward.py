"""The whole model: held in memory, or streamed one layer at a time when it does not fit."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from klquant.checkpoint.config import KimiLinearConfig
from klquant.model.block import State, block, new_state
from klquant.model.norm import rms_norm
from klquant.model.weights import LayerWeights, Linear, WeightSource, wide_linear

EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


@dataclass(frozen=True)
class Head:
    """Final norm [C] and output projection [V, C]."""

    norm: Tensor
    proj: Linear

    @classmethod
    def load(cls, source: WeightSource, dtype: torch.dtype, device: torch.device | str) -> "Head":
        return cls(*(source.weight(name, dtype).to(device) for name in (FINAL_NORM, HEAD)))

    def __call__(self, cfg: KimiLinearConfig, h_BSC: Tensor) -> Tensor:
        """Residual stream after the last layer → logits [B, S, V]."""
        return wide_linear(rms_norm(h_BSC, self.norm, cfg.rms_eps), self.proj)


@dataclass(frozen=True)
class Model:
    """Every weight of a model, in memory."""

    cfg: KimiLinearConfig
    embedding_VC: Tensor
    layers: tuple[LayerWeights, ...]
    head: Head

    @classmethod
    def load(cls, source: WeightSource, dtype: torch.dtype, device: torch.device | str) -> "Model":
        layers = (LayerWeights.load(source, layer, dtype, device) for layer in range(source.config.num_layers))
        return cls(
            source.config, source.weight(EMBEDDING, dtype).to(device), tuple(layers), Head.load(source, dtype, device)
        )

    def new_state(self, batch: int) -> list[State]:
        """State of `batch` sequences of equal length that have not begun, one entry a layer."""
        dtype, device = self.embedding_VC.dtype, self.embedding_VC.device
        return [new_state(self.cfg, layer, batch, dtype, device) for layer in range(self.cfg.num_layers)]

    def hidden(self, ids_BS: Tensor, state: list[State] | None = None) -> Tensor:
        """Residual stream after the last layer [B, S, C]. With a state the sequences go on from it."""
        h_BSC = F.embedding(ids_BS, self.embedding_VC)
        for w, layer_state in zip(self.layers, state or [None] * len(self.layers), strict=True):
            h_BSC = block(self.cfg, w, h_BSC, layer_state)
        return h_BSC

    def logits(self, ids_BS: Tensor, state: list[State] | None = None) -> Tensor:
        """Logits [B, S, V] of every position, in the weights' dtype."""
        return self.head(self.cfg, self.hidden(ids_BS, state))


@torch.no_grad()
def stream_hidden(
    source: WeightSource, ids_WS: Tensor, *, dtype: torch.dtype, device: torch.device | str, batch: int
) -> Iterator[tuple[int, Tensor]]:
    """Push all windows through the layers, one layer in memory at a time.

    Yields (layer, residual stream after it [W, S, C]) on the CPU; it is one tensor, overwritten by the next layer.
    `batch` windows are on the device at once.
    """
    cfg = source.config
    h_WSC = F.embedding(ids_WS.cpu(), source.weight(EMBEDDING, dtype))
    for layer in range(cfg.num_layers):
        w = LayerWeights.load(source, layer, dtype, device)
        for part in h_WSC.split(batch):
            part.copy_(block(cfg, w, part.to(device)))
        del w  # before the next layer is read
        yield layer, h_WSC


@torch.no_grad()
def stream_logits(
    source: WeightSource, ids_WS: Tensor, *, dtype: torch.dtype, device: torch.device | str, batch: int
) -> Iterator[Tensor]:
    """Logits [≤ batch, S, V] of the windows in order, on the device, with one layer in memory at a time."""
    *_, (_, h_WSC) = stream_hidden(source, ids_WS, dtype=dtype, device=device, batch=batch)
    head = Head.load(source, dtype, device)
    for part in h_WSC.split(batch):
        yield head(source.config, part.to(device))
