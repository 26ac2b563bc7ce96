"""Which directions of the residual stream matter: those that the routers of later layers read.

A flipped choice of experts costs far more than the error that flipped it, so an error in a direction that routers read
weighs more than one that they are blind to. Shape suffixes: C = hidden, E = experts, V = vocabulary.
"""

import torch
from torch import Tensor

from klquant.model.forward import FINAL_NORM, HEAD
from klquant.model.weights import WeightSource

# A router counts 0.7 times as much as the one before it: the stream grows with depth, and the norm divides by it.
DECAY = 0.7


class StreamMetric:
    """Metrics (1 − λ)I + λC, C of mean diagonal 1, for maps that write into the stream; λ is `share`."""

    def __init__(self, source: WeightSource, share: float, device: torch.device) -> None:
        self.source, self.share, self.device = source, share, device

    def after(self, layer: int) -> tuple[Tensor, Tensor]:
        """Metrics [C, C] for the output of the attention and of the MLP of a layer."""
        config = self.source.config
        routers = [x for x in range(config.num_layers) if config.is_moe(x)]
        return tuple(self._metric([x for x in routers if x >= first]) for first in (layer, layer + 1))

    def _metric(self, routers: list[int]) -> Tensor:
        if routers:
            reads = sum(DECAY**i * _unit(self._router(layer)) for i, layer in enumerate(routers))
        else:
            reads = self._head()
        eye = torch.eye(reads.shape[0], device=self.device)
        return (1 - self.share) * eye + self.share * _unit(reads)

    def _router(self, layer: int) -> Tensor:
        """What the router reads [C, C]. A change that moves all experts alike moves no choice, hence the centring."""
        prefix = f"model.layers.{layer}."
        router_EC, norm_C = self._weights(
            prefix + "block_sparse_moe.gate.weight", prefix + "post_attention_layernorm.weight"
        )
        read_EC = (router_EC - router_EC.mean(0)) * norm_C
        return read_EC.mT @ read_EC

    def _head(self) -> Tensor:
        head_VC, norm_C = self._weights(HEAD, FINAL_NORM)
        read_VC = head_VC * norm_C
        return read_VC.mT @ read_VC

    def _weights(self, *names: str) -> tuple[Tensor, ...]:
        return tuple(self.source.weight(name, torch.float32).to(self.device) for name in names)


def _unit(c_CC: Tensor) -> Tensor:
    return c_CC / c_CC.diagonal().mean()
