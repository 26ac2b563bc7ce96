"""What a norm may add up on the way."""

from dataclasses import dataclass

from torch import Tensor

# Up to so many tokens what is added to the stream stays FP32: more tokens' rows would cost time to write.
WIDE_TOKENS = 64


@dataclass(frozen=True)
class Parts:
    """A sum [T, C] not yet made, Σ_r rows[:, r] + beside: in FP32, in this order, rounded once to the stream's."""

    rows_TRC: Tensor
    beside_TC: Tensor | None = None
