"""What the model's own klquant.json says about its making: errors by class and layer, expert tokens, fallbacks."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from klquant.checkpoint.config import KimiLinearConfig
from klquant.checkpoint.index import PROVENANCE, read_json
from klquant.checkpoint.names import expected_tensors, parse_name
from klquant.checkpoint.quantized import QuantizedReader
from klquant.checkpoint.reader import CheckpointReader
from klquant.errors import UserError
from klquant.evaluate.result import ErrorRow, Quantization


def read_provenance(folder: Path) -> dict | None:
    """klquant.json of a checkpoint, None where another tool made it."""
    path = folder / PROVENANCE
    return read_json(path) if path.exists() else None


@contextmanager
def _as_written(folder: Path) -> Iterator[None]:
    """What klquant.json says is read inside. Raises UserError naming it where it has another form."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError):
        raise UserError(
            f"{folder / PROVENANCE}: not as klquant quantize writes it; move it away if it is another tool's"
        ) from None


def quantization(folder: Path, config: KimiLinearConfig) -> Quantization | None:
    """Raises UserError naming the file when it is not as `klquant quantize` writes it."""
    raw = read_provenance(folder)
    if raw is None:
        return None
    with _as_written(folder):
        groups: dict[tuple, list[float]] = {}
        for module, record in raw["tensors"].items():
            key = parse_name(f"{module}.weight", config)
            groups.setdefault((key.cls, key.layer, record["measured"]), []).append(record["error"])
        return Quantization(
            recipe=raw["recipe"]["name"],
            target=raw["target"],
            errors=[
                ErrorRow(tensor_class=cls, layer=layer, measured=measured, tensors=len(errors),
                         mean_error=sum(errors) / len(errors), max_error=max(errors))
                for (cls, layer, measured), errors in groups.items()
            ],
            expert_tokens={int(layer): tokens for layer, tokens in raw["expert_tokens"].items()},
            fallbacks=raw["fallbacks"],
        )  # fmt: skip


def calibrated_on(folder: Path) -> set[str]:
    """Where the calibration text of a checkpoint came from (`Source.origin`). Raises UserError as `quantization`."""
    with _as_written(folder):
        text = (read_provenance(folder) or {}).get("calibration") or {}
        return {source["origin"] for source in text.get("sources", [])}


def require_own_scales(reader: QuantizedReader, base: QuantizedReader) -> None:
    """Raises UserError unless each quantized matrix of `reader` approximates that of `base`, and all else is equal.

    AWQ folds scales from one tensor into another: what it makes is equal only as a whole.
    """
    folder = reader.files.folder
    with _as_written(folder):
        records = (read_provenance(folder) or {}).get("tensors") or {}
        folded = any(record.get("algorithm") == "awq" for record in records.values())
    if folded:
        raise UserError(f"{folder}: made by AWQ, which folds scales into other tensors; no part of it can stand alone")
    if reader.config != base.config:
        raise UserError(f"{folder}: its config is not that of {base.files.folder}; it is of another model")
    for name in expected_tensors(reader.config):
        if reader.spec(name.removesuffix(".weight")) is None and not _equal(reader.files, base.files, name):
            raise UserError(
                f"{folder}: {name} is kept, but differs from that of {base.files.folder}; scales were folded into it "
                "(AWQ), or it is of another model, and no part of it can stand alone"
            )


def _equal(a: CheckpointReader, b: CheckpointReader, name: str) -> bool:
    if (a.info(name).dtype, a.info(name).shape) != (b.info(name).dtype, b.info(name).shape):
        return False
    return all(torch.equal(x, y) for x, y in zip(a.chunks(name), b.chunks(name), strict=True))
