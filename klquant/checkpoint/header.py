"""The safetensors header, read strictly: a damaged or hostile file gives a table or a UserError, nothing else.

A file is an 8-byte little-endian header length, a JSON object name → {dtype, shape, data_offsets}, then the data. This
reader accepts nothing that the safetensors library refuses (a test holds it to that), allocates no more than the
header's own size, and names the file and the tensor in every error.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from klquant.checkpoint.layout import ITEM_BYTES, nbytes
from klquant.errors import UserError

MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
MAX_ELEMENTS = 1 << 48
LFS_POINTER = b"version https://git-lfs"  # what such a file begins with; as a header's length far beyond the limit


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: `offset` counts from the start of the file `shard`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: Path
    offset: int
    nbytes: int


def parse_json(data: bytes, where: str):
    """JSON in which no object names a key twice. Raises UserError naming `where`."""

    def unique(pairs: list) -> dict:
        table = dict(pairs)
        if len(table) != len(pairs):
            seen = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))
            raise UserError(f"{where}: {twice!a} is listed twice")
        return table

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0] if isinstance(error, ValueError) else "nested too deeply"
        raise UserError(f"{where}: not valid JSON ({reason}); the file is damaged") from None


def read_header(path: Path) -> tuple[dict[str, TensorInfo], bytes]:
    """All tensors of one safetensors file in file order, and the raw header bytes."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(len(LFS_POINTER))
            if start == LFS_POINTER:
                raise UserError(f"{path}: is a git-LFS pointer, not the file itself; run git lfs pull in its folder")
            file.seek(8)
            length = int.from_bytes(start[:8], "little")
            if not 2 <= length <= MAX_HEADER or 8 + length > size:
                raise UserError(f"{path}: truncated or not a safetensors file (header length does not fit its size)")
            raw = file.read(length)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if raw[:1] != b"{":
        raise UserError(f"{path}: not a safetensors file (its header is no JSON object)")
    table = parse_json(raw, str(path))
    _check_metadata(table.pop("__metadata__", {}), path)
    data_start = 8 + length
    tensors = [_entry(name, entry, path, data_start) for name, entry in table.items()]
    tensors.sort(key=lambda info: (info.offset, info.nbytes))
    end = data_start
    for info in tensors:
        if info.offset != end:
            raise UserError(f"{path}: tensor {info.name}: its data overlaps another tensor or leaves a gap before it")
        end += info.nbytes
    if end != size:
        at = f"tensor {tensors[-1].name} ends" if tensors else "its header ends"
        kind = "truncated" if end > size else "longer than its header says"
        raise UserError(f"{path}: {kind}: {at} at byte {end}, the file at byte {size}")
    return {info.name: info for info in tensors}, raw


def _check_metadata(metadata, path: Path) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise UserError(f"{path}: header: __metadata__ is not an object of strings")


def _entry(name: str, entry, path: Path, data_start: int) -> TensorInfo:
    if not name.isprintable():
        raise UserError(f"{path}: header: the tensor name {name!a} holds control characters")
    where = f"{path}: tensor {name}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise UserError(f"{where}: its header entry is not dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise UserError(f"{where}: unknown dtype {dtype!a}")
    # Beside a 0, other sizes may be anything as far as the bytes go, but not for an allocator.
    if not _is_sizes(shape) or nbytes("U8", tuple(size for size in shape if size)) > MAX_ELEMENTS:
        raise UserError(f"{where}: its shape {shape!a:.60} is not a list of sizes")
    if not _is_sizes(offsets) or len(offsets) != 2:
        raise UserError(f"{where}: its data_offsets {offsets!a:.60} are not two positions")
    begin, end = offsets
    if end - begin != nbytes(dtype, tuple(shape)):
        raise UserError(f"{where}: {end - begin} bytes of data do not make shape {shape} of {dtype}")
    return TensorInfo(name, dtype, tuple(shape), path, data_start + begin, end - begin)


def _is_sizes(value) -> bool:
    return isinstance(value, list) and len(value) <= 16 and all(type(x) is int and 0 <= x < 1 << 63 for x in value)
