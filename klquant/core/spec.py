"""What a weight is stored as: bits, group size, symmetry."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

from klquant.errors import UserError

WHOLE_ROW = -1


def packed_words(codes: int, bits: int) -> int:
    """int32 words that `codes` densely packed codes take."""
    return -(-codes * bits // 32)


class WeightSpec(BaseModel):
    """An integer grid for a weight [N, K]: `bits` a code, one scale for `group_size` inputs of a row (−1: whole row).

    Symmetric codes live in [−2^(b−1), 2^(b−1) − 1] and decode to `code · scale`; asymmetric ones share that range and
    decode to `(code − zero) · scale`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    bits: Literal[3, 4, 8]
    group_size: Literal[32, 64, 128, -1] = 128
    symmetric: bool = True

    @property
    def qmin(self) -> int:
        return -(1 << (self.bits - 1))

    @property
    def qmax(self) -> int:
        return (1 << (self.bits - 1)) - 1

    def groups(self, k: int, what: str = "weight") -> int:
        """Number of groups along K. Raises UserError, naming `what`, when the group does not divide K."""
        if self.group_size == WHOLE_ROW:
            return 1
        if k % self.group_size:
            raise UserError(
                f"{what}: {k} input features are not a multiple of group size {self.group_size}; "
                "choose a smaller group_size in the recipe, or -1 for one scale a row"
            )
        return k // self.group_size

    def width(self, k: int) -> int:
        """Inputs that share a scale when the row has `k` of them."""
        return k if self.group_size == WHOLE_ROW else self.group_size

    def __str__(self) -> str:
        group = "row" if self.group_size == WHOLE_ROW else f"g{self.group_size}"
        return f"INT{self.bits} {group}" + ("" if self.symmetric else " asym")
