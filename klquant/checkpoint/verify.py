"""`verify`: read everything a checkpoint folder holds, and list what is wrong with it."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from klquant.checkpoint.index import CONFIG, INDEX, PROVENANCE, inside, read_json
from klquant.checkpoint.quantized import QuantizedReader
from klquant.checkpoint.reader import CHUNK
from klquant.checkpoint.scheme import linear_modules
from klquant.errors import UserError


def verify(folder: Path) -> list[str]:
    """Problems of a checkpoint, 16-bit or quantized, one line each; none means that it is good.

    Checks that every tensor is there once with its shape and dtype, that values are finite and scales positive, that
    the quantization fits the tensors, the index its total, and the files the hashes in klquant.json if that is there.
    Reads a few MB at a time.
    """
    folder = Path(folder)
    try:
        reader = QuantizedReader.open(folder)
        problems = [f"{folder}: {problem}" for problem in reader.problems()]
    except UserError as error:
        return [str(error)]
    problems += _idle_groups(reader)
    problems += _wrong_total(reader)
    for name, (dtypes, _) in reader.expected.items():
        if name in reader.files.tensors and reader.files.tensors[name].dtype in dtypes:
            problems += _wrong_values(reader, name)
    if (folder / PROVENANCE).exists():
        problems += _wrong_files(reader)
    return problems


def _idle_groups(reader: QuantizedReader) -> Iterator[str]:
    """Groups that no module belongs to: the config means other modules than there are."""
    if reader.schemes is not None:
        used = {reader.schemes.group(module, linear) for module, linear in linear_modules(reader.config).items()}
        for group in reader.schemes.groups:
            if group not in used:
                yield f"{reader.files.folder / CONFIG}: quantization_config: group {group} matches no module"


def _wrong_total(reader: QuantizedReader) -> Iterator[str]:
    path = reader.files.folder / INDEX
    if path.exists():
        metadata = read_json(path).get("metadata")
        listed = metadata.get("total_size") if isinstance(metadata, dict) else None
        total = sum(info.nbytes for info in reader.files.tensors.values())
        if listed is not None and listed != total:
            yield f"{path}: total_size is {json.dumps(listed)}, but the tensors take {total} bytes"


def _wrong_values(reader: QuantizedReader, name: str) -> Iterator[str]:
    if name.endswith((".weight_packed", ".weight_zero_point")):
        return  # every bit pattern is a code
    try:
        for chunk in reader.files.chunks(name):
            reader.check_values(name, chunk)
    except UserError as error:
        yield str(error)


def _wrong_files(reader: QuantizedReader) -> Iterator[str]:
    folder = reader.files.folder
    where = folder / PROVENANCE
    try:
        provenance = read_json(where)
    except UserError as error:
        yield str(error)
        return
    shards, others = provenance.get("shards"), provenance.get("files", {})
    for key, listed in (("shards", shards), ("files", others)):
        if not isinstance(listed, dict) or not all(isinstance(entry, dict) for entry in listed.values()):
            yield f"{where}: {key} is not an object of file → sha256, bytes"
            return
    for path in sorted({info.shard for info in reader.files.tensors.values()}):
        if path.name not in shards:
            yield f"{path}: is not listed in {PROVENANCE}"
    for name, entry in (shards | others).items():
        try:
            path = inside(folder, name, str(where))
            size, digest = 0, hashlib.sha256()
            with path.open("rb", buffering=0) as file:
                while block := file.read(CHUNK):
                    size += len(block)
                    digest.update(block)
        except UserError as error:
            yield str(error)
        except OSError as error:
            yield f"{folder / name}: cannot be read: {error.strerror}"
        else:
            if entry.get("bytes") != size or entry.get("sha256") != digest.hexdigest():
                yield f"{path}: differs from what was written ({PROVENANCE} has another size or SHA-256)"
