"""What becomes of one tensor, and what a target changed."""

from dataclasses import dataclass
from functools import cached_property
from math import prod

from klquant.checkpoint.layout import Stored, nbytes, packed_parts
from klquant.checkpoint.names import TensorClass, TensorKey
from klquant.core.spec import WeightSpec
from klquant.recipe.schema import Algorithm

KEPT_BY_DEFAULT = "no rule names it"


@dataclass(frozen=True)
class Decision:
    """What becomes of one tensor. `spec` and `algorithm` are None when it is kept as it is; `rule` is the index of the
    recipe's rule that decided, None when no rule names the tensor."""

    key: TensorKey
    shape: tuple[int, ...]
    dtype: str
    spec: WeightSpec | None = None
    algorithm: Algorithm | None = None
    why: str = KEPT_BY_DEFAULT
    rule: int | None = None

    @property
    def weights(self) -> int:
        return prod(self.shape)

    @cached_property
    def bytes_before(self) -> int:
        return nbytes(self.dtype, self.shape)

    @cached_property
    def bytes_after(self) -> int:
        if self.spec is None:
            return self.bytes_before
        return sum(part.nbytes for part in packed_parts(self.shape, self.spec))


@dataclass(frozen=True)
class Change:
    """Tensors that the target made the plan keep although the recipe quantizes them, and the bytes that costs."""

    cls: TensorClass
    roles: tuple[str, ...]
    count: int
    wanted: WeightSpec
    why: str
    extra_bytes: int


def stored_tensors(decision: Decision) -> list[Stored]:
    """(name, dtype, shape, nbytes) of every output tensor that holds the decision's weight, in file order."""
    if decision.spec is None:
        return [Stored(decision.key.name, decision.dtype, decision.shape, decision.bytes_before)]
    parts = packed_parts(decision.shape, decision.spec)
    return [part._replace(name=f"{decision.key.module}.{part.name}") for part in parts]
