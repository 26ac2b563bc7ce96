"""A quantized model in parts: its matrices by class or by layer, the part whose error should cost most first."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from klquant.checkpoint.config import KimiLinearConfig
from klquant.checkpoint.layout import packed_parts
from klquant.checkpoint.names import TensorClass, TensorKey, expected_tensors, parse_name
from klquant.core.spec import WeightSpec
from klquant.evaluate.options import By
from klquant.evaluate.sensitivity_result import SensitivePart

EVERYTHING = "everything"
# Classes that come apart by role: what reads the stream, and what writes into it.
SPLIT: dict[TensorClass, tuple[tuple[str, ...], ...]] = {
    TensorClass.ROUTED_EXPERTS: (("w1", "w3"), ("w2",)),
    TensorClass.KDA_PROJ: (("q_proj", "k_proj", "v_proj"), ("o_proj",)),
}


@dataclass(frozen=True)
class TensorPart:
    """Hub names of matrices that are quantized together. `importance`: the order in which parts are looked at."""

    said: SensitivePart
    names: frozenset[str]
    importance: float


def parts(
    config: KimiLinearConfig, specs: Mapping[str, WeightSpec | None], by: By, nbytes: Mapping[str, int]
) -> list[TensorPart]:
    """All that `specs` (module → its grid) quantizes, then its parts, each matrix in one of them. nbytes: of the
    matrices (by hub name) as they were.

    The order is by Σ 4^(−bits) · weights that a token passes through: the squared step of a grid, for as many products.
    """
    shapes = expected_tensors(config)
    grids = {f"{module}.weight": spec for module, spec in specs.items() if spec is not None}
    groups: dict[tuple, list[TensorKey]] = {}
    for key in (parse_name(name, config) for name in shapes if name in grids):
        groups.setdefault(_place(key, by), []).append(key)

    def part(place: tuple, keys: list[TensorKey]) -> TensorPart:
        cls, roles, layer = place
        weights = {key.name: prod(shapes[key.name]) for key in keys}
        active = {key.name: weights[key.name] * _share(key, config) for key in keys}
        after = sum(p.nbytes for key in keys for p in packed_parts(shapes[key.name], grids[key.name]))
        total = sum(weights.values())
        return TensorPart(
            SensitivePart(
                name=_name(place), tensor_class=cls, roles=list(roles), layer=layer,
                scheme=dict(sorted(Counter(str(grids[key.name]) for key in keys).items())),
                weights=total, bytes_before=sum(nbytes[name] for name in weights), bytes_after=after,
            ),
            frozenset(weights),
            sum(4.0 ** -grids[name].bits * count for name, count in active.items()),
        )  # fmt: skip

    every = part((None, (), None), [key for keys in groups.values() for key in keys])
    return [every, *sorted((part(*group) for group in groups.items()), key=lambda p: -p.importance)]


def _place(key: TensorKey, by: By) -> tuple[TensorClass | None, tuple[str, ...], int | None]:
    """(class, roles, layer) of the part a matrix belongs to; None and () where the part is not told apart by it."""
    if by == "layer" and key.layer is not None:
        return None, (), key.layer
    return key.cls, next((roles for roles in SPLIT.get(key.cls, ()) if key.role in roles), ()), None


def _name(place: tuple[TensorClass | None, tuple[str, ...], int | None]) -> str:
    cls, roles, layer = place
    if cls is None:
        return EVERYTHING if layer is None else f"layer {layer}"
    return " ".join([cls, *(role.removesuffix("_proj") for role in roles)])


def _share(key: TensorKey, config: KimiLinearConfig) -> float:
    """How much of a matrix a token passes through, on average."""
    return config.top_k / config.num_experts if key.cls == TensorClass.ROUTED_EXPERTS else 1.0
