"""The result file of `klquant sensitivity`: strict and versioned like that of `klquant eval`."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from klquant.evaluate.options import By
from klquant.evaluate.part import Part
from klquant.evaluate.result import Arithmetic, Compared, Data, Floor, Provenance, Reference, load

SCHEMA = 1


class SensitivePart(Part):
    """Matrices quantized together: of a class (with `roles`, those of it only), of a layer, or, where both are None,
    all that the model has quantized. `scheme`: grid → how many; `weights` take `bytes_before` in 16 bits."""

    name: str
    tensor_class: str | None
    roles: list[str]
    layer: int | None
    scheme: dict[str, int] = Field(min_length=1)
    weights: int
    bytes_before: int
    bytes_after: int

    @property
    def is_whole(self) -> bool:
        return self.tensor_class is None and self.layer is None


class Quantizer(Part):
    """How parts were quantized: rounded to nearest on the grids of `recipe`, or as the checkpoint `name` has them."""

    method: Literal["rtn", "checkpoint"]
    name: str
    recipe: str | None
    fingerprint: str


class Entry(Part):
    """The reference with one part quantized. `seconds`: what its pass takes."""

    part: SensitivePart
    overall: Compared
    domains: dict[str, Compared]
    seconds: float


class Sensitivity(Part):
    """`klquant sensitivity`'s output. `left_out`: parts for which no time was left. `floor`: None where it is not
    known. `provenance` is about the last run, which may have found most entries made."""

    schema_version: Literal[1] = SCHEMA
    kind: Literal["klquant-sensitivity"] = "klquant-sensitivity"
    by: By
    quantizer: Quantizer
    arithmetic: Arithmetic
    reference: Reference
    data: Data
    floor: Floor | None
    entries: list[Entry]
    left_out: list[str]
    notes: list[str]
    provenance: Provenance

    @property
    def ranked(self) -> list[Entry]:
        """Everything first; then layers in their order, or classes from the costliest to the cheapest."""

        def place(e: Entry) -> tuple:
            return not e.part.is_whole, e.part.layer is None, e.part.layer or 0, -e.overall.kld.mean

        return sorted(self.entries, key=place)


def load_sensitivity(path: Path) -> Sensitivity:
    """Raises UserError, naming the file, when it is missing, cut off, or of another schema."""
    return load(path, Sensitivity)
