"""Fields of LayerWeights by dotted path ("attn.q_proj", "mlp.shared.up_proj", "mlp.w1"), and the tensors behind."""

from collections.abc import Callable
from dataclasses import fields, replace
from functools import reduce
from typing import TypeVar

from torch import Tensor

from klquant.model.weights import (
    DENSE_NAMES,
    EXPERT_NAMES,
    KDA_NAMES,
    MLA_NAMES,
    NORM_NAMES,
    ROUTER_NAMES,
    SHARED_NAMES,
    LayerWeights,
    MLAWeights,
    MoEWeights,
)

Node = TypeVar("Node")


def get(weights: LayerWeights, path: str) -> Tensor:
    return reduce(getattr, path.split("."), weights)


def put(weights: Node, path: str, value: Tensor) -> Node:
    """A copy of the (nested, frozen) weights with one field replaced."""
    head, _, rest = path.partition(".")
    return replace(weights, **{head: put(getattr(weights, head), rest, value) if rest else value})


def map_tensors(weights: Node, change: Callable[[Tensor], Tensor]) -> Node:
    """The same (nested, frozen) weights with every tensor changed."""
    values = {field.name: getattr(weights, field.name) for field in fields(weights)}
    return replace(
        weights, **{k: change(v) if isinstance(v, Tensor) else map_tensors(v, change) for k, v in values.items()}
    )


def is_stack(path: str) -> bool:
    """Whether the field holds one weight for each expert."""
    return path.removeprefix("mlp.") in EXPERT_NAMES


def tensor_names(weights: LayerWeights, path: str) -> list[str]:
    """Hub names, without `model.layers.L.`, of the tensors behind a path: one, or one for each expert."""
    part, _, field = path.rpartition(".")
    if not part:
        return [NORM_NAMES[field]]
    if part == "attn":
        return [(MLA_NAMES if isinstance(weights.attn, MLAWeights) else KDA_NAMES)[field]]
    if part == "mlp.shared":
        return [SHARED_NAMES[field]]
    if is_stack(path):
        return [EXPERT_NAMES[field].format(e) for e in range(get(weights, path).shape[0])]
    return [(ROUTER_NAMES if isinstance(weights.mlp, MoEWeights) else DENSE_NAMES)[field]]
