"""What a norm may add up on the way."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Parts:
    """A sum [T, C] not yet made, Σ_r routed + shared: in FP32, in this order, rounded once to their dtype."""

    routed_TRC: Tensor
    shared_TC: Tensor | None
