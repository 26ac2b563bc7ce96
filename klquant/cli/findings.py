"""What `klquant inspect` finds in a checkpoint: how each tensor is stored and, where klquant made it, what it cost."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from klquant.checkpoint.config import KimiLinearConfig
from klquant.checkpoint.index import PROVENANCE, read_json
from klquant.checkpoint.names import TensorClass, TensorKey, expected_tensors, parse_name
from klquant.checkpoint.quantized import QuantizedReader, packed_layout
from klquant.errors import UserError

# Quantiles of the tokens that the experts of a layer saw.
QUANTILES = {"least": 0.0, "p1": 0.01, "p10": 0.1, "median": 0.5, "p90": 0.9, "most": 1.0}


class Record(BaseModel):
    """How one weight fared, as klquant.json has it."""

    model_config = ConfigDict(frozen=True)

    spec: str
    algorithm: str
    error: float
    measured: str
    tokens: int | None = None
    fallback: str | None = None


class Source(BaseModel):
    """Calibration text of one origin."""

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str
    windows: int


class Calibration(BaseModel):
    """The text that a checkpoint was calibrated on: `windows` of `window` tokens."""

    model_config = ConfigDict(frozen=True, extra="allow")

    sources: list[Source]
    windows: int
    window: int


class Change(BaseModel):
    """What the target kept in 16 bits although the recipe quantizes it."""

    model_config = ConfigDict(frozen=True, extra="allow")

    cls: str = Field(alias="class")
    roles: list[str]
    count: int
    why: str


class Provenance(BaseModel):
    """What `inspect` reads of klquant.json."""

    model_config = ConfigDict(frozen=True)

    versions: dict[str, str]
    recipe: dict
    target: str
    changes: list[Change]
    calibration: Calibration | None
    tensors: dict[str, Record]
    expert_tokens: dict[int, list[int]]
    fallbacks: list[str]


@dataclass(frozen=True)
class Found:
    """One tensor of the model. `stored`: a grid (INT4 g128) or a dtype; `nbytes`: with scales and zero points."""

    key: TensorKey
    weights: int
    stored: str
    quantized: bool
    nbytes: int
    record: Record | None


@dataclass(frozen=True)
class Findings:
    """A checkpoint's tensors in file order, narrowed to a layer or a class where asked for, and its provenance."""

    folder: Path
    config: KimiLinearConfig
    files: int
    tensors: list[Found]
    missing: int
    provenance: Provenance | None

    @property
    def measured(self) -> list[Found]:
        """The tensors whose error is known."""
        return [t for t in self.tensors if t.record is not None]

    @property
    def experts(self) -> dict[int, list[int]]:
        """Layer → calibration tokens of each expert, for the layers and classes asked for."""
        layers = {t.key.layer for t in self.tensors if t.key.cls == TensorClass.ROUTED_EXPERTS}
        tokens = {} if self.provenance is None else self.provenance.expert_tokens
        return {layer: row for layer, row in sorted(tokens.items()) if layer in layers and row}


def find(folder: Path, layer: int | None = None, cls: TensorClass | None = None) -> Findings:
    """Read config, headers and klquant.json; no weights. Raises UserError for what cannot be read."""
    reader = QuantizedReader.open(folder)
    config, infos = reader.config, reader.files.tensors
    if layer is not None and not 0 <= layer < config.num_layers:
        raise UserError(f"{folder}: there is no layer {layer}; layers count from 0 to {config.num_layers - 1}")
    provenance = _provenance(folder)
    records = {} if provenance is None else provenance.tensors
    tensors, missing = [], 0
    for name, shape in expected_tensors(config).items():
        key = parse_name(name, config)
        if (layer is not None and key.layer != layer) or (cls is not None and key.cls != cls):
            continue
        spec = reader.spec(key.module) if key.is_matrix else None
        names = [name] if spec is None else list(packed_layout(key.module, shape, spec))
        present = [infos[n] for n in names if n in infos]
        missing += len(names) - len(present)
        stored = str(spec) if spec else present[0].dtype if present else "missing"
        nbytes = sum(info.nbytes for info in present)
        tensors.append(Found(key, math.prod(shape), stored, spec is not None, nbytes, records.get(key.module)))
    if not tensors:
        raise UserError(f"{folder}: layer {layer} has no tensor of {cls}")
    return Findings(folder, config, len({i.shard for i in infos.values()}), tensors, missing, provenance)


def group(tensors: Iterable[Found], *parts: str) -> dict[tuple, list[Found]]:
    """Tensors by some of their key's fields (`cls`, `role`, `layer`) or their own (`stored`), in file order."""
    groups: dict[tuple, list[Found]] = {}
    for t in tensors:
        groups.setdefault(tuple(getattr(t, p) if hasattr(t, p) else getattr(t.key, p) for p in parts), []).append(t)
    return groups


def mean_error(tensors: list[Found]) -> float:
    return mean(t.record.error for t in tensors)


def worst(tensors: list[Found]) -> Found:
    return max(tensors, key=lambda t: t.record.error)


def quantiles(counts: list[int]) -> dict[str, int]:
    """QUANTILES of some counts, each one of the counts (the lower one between two), and how many are 0."""
    ordered = sorted(counts)
    values = {name: ordered[int(q * (len(ordered) - 1))] for name, q in QUANTILES.items()}
    return {"none": ordered.count(0), **values}


def _provenance(folder: Path) -> Provenance | None:
    path = folder / PROVENANCE
    if not path.exists():
        return None
    try:
        return Provenance.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path}: {key}: {first['msg'].lower()}; not a file that klquant wrote") from None
