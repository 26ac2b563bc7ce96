"""Atomic, deterministic writing: a file is whole under its name or not there at all.

Everything goes to a hidden temporary file in the target folder, is flushed to the disk and then renamed. The
safetensors bytes are those of the safetensors library (a test compares them), streamed so that a shard is neither held
twice in memory nor read back for its hash.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from klquant.checkpoint.dtypes import DTYPE_NAMES
from klquant.checkpoint.index import INDEX, inside
from klquant.errors import UserError

COPY_BLOCK = 1 << 24
# The library's order of dtypes in a file: highest alignment first.
_ORDER = ("I64", "F64", "F32", "I32", "BF16", "F16", "I16", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL")
_SIDE_FILES = (
    "tokenizer*", "tiktoken.model", "*.jinja", "chat_template.json", "special_tokens_map.json", "added_tokens.json",
    "generation_config.json", "LICENSE*", "LICENCE*", "NOTICE*",
)  # fmt: skip
_SIDE_SUFFIXES = ("", ".json", ".jinja", ".model", ".txt", ".md")


@dataclass(frozen=True)
class ShardRecord:
    """A written file: name, size in bytes, SHA-256 in hex."""

    file: str
    nbytes: int
    sha256: str


@dataclass(frozen=True)
class Shard:
    """A planned file and the tensors it will hold."""

    file: str
    names: tuple[str, ...]


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> ShardRecord:
    """Write one shard. Same tensors, same bytes, whatever their order in the mapping."""
    names = sorted(tensors, key=lambda name: (_ORDER.index(DTYPE_NAMES[tensors[name].dtype]), name))
    table: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for name in names:
        tensor = tensors[name]
        end = offset + tensor.nbytes
        table[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end],
        }  # fmt: skip
        offset = end
    header = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    size = 8 + len(header) + offset
    digest = hashlib.sha256()
    with _atomic(path, size) as file:
        for block in (len(header).to_bytes(8, "little"), header, *(_view(tensors[name]) for name in names)):
            digest.update(block)
            file.write(block)
    return ShardRecord(path.name, size, digest.hexdigest())


def json_bytes(value: object) -> bytes:
    """A JSON file: indented, in the order of the keys."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def write_json(path: Path, value: object) -> None:
    data = json_bytes(value)
    with _atomic(path, len(data)) as file:
        file.write(data)


def plan_shards(units: Sequence[Sequence[tuple[str, int]]], max_bytes: int) -> list[Shard]:
    """Files for units of (name, bytes). A shard never spans two units; a unit above `max_bytes` takes several.

    A single tensor above `max_bytes` gets a shard of its own.
    """
    parts: list[list[str]] = []
    for unit in units:
        room = -1
        for name, size in unit:
            if size > room:
                parts.append([])
                room = max_bytes
            parts[-1].append(name)
            room -= size
    return [Shard(f"model-{i:05d}-of-{len(parts):05d}.safetensors", tuple(names)) for i, names in enumerate(parts, 1)]


def write_index(folder: Path, shards: Sequence[Shard], sizes: Mapping[str, int]) -> None:
    """Write model.safetensors.index.json: tensor → shard, and the total of the tensors' bytes."""
    weight_map = {name: shard.file for shard in shards for name in shard.names}
    total = sum(sizes[name] for name in weight_map)
    write_json(Path(folder) / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def side_files(source: Path) -> list[Path]:
    """Tokenizer, chat template, generation config and licence files, by name. Never code, weights or pickles."""
    found = {path for pattern in _SIDE_FILES for path in Path(source).glob(pattern)}
    return sorted(path for path in found if path.is_file() and path.suffix in _SIDE_SUFFIXES)


def copy_side_files(source: Path, target: Path) -> list[str]:
    """Copy `side_files`; names of the copies, sorted."""
    names = [path.name for path in side_files(source)]
    for name in names:
        path = inside(Path(source), name, str(source))
        try:
            size, file = path.stat().st_size, path.open("rb")
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None
        with file, _atomic(Path(target) / name, size) as copy:
            while block := file.read(COPY_BLOCK):
                copy.write(block)
    return names


@contextmanager
def _atomic(path: Path, size: int) -> Iterator[BinaryIO]:
    """A file that takes its name when the block ends well and leaves nothing behind when it does not.

    The temporary name is fixed, so that what a killed run left is overwritten by the next one.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)
    except OSError as error:
        raise UserError(
            f"{path}: cannot write {size:,} bytes: {error.strerror or error}; free space or choose another folder"
        ) from None


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _view(tensor: Tensor) -> memoryview:
    """The tensor's bytes, without a copy when it is a contiguous CPU tensor."""
    return memoryview(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
