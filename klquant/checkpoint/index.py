"""What a checkpoint folder says it holds: config.json, the tensor index and the shard headers, without any weights.

Two kinds of folder can be planned: a checkpoint (shards with headers) and a description (`tensors.json` or
`tensors.json.gz`: name → dtype, shape), which has no weights to read.
"""

import gzip
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath

from klquant.checkpoint.config import KimiLinearConfig
from klquant.checkpoint.header import TensorInfo, parse_json, read_header
from klquant.checkpoint.layout import ITEM_BYTES
from klquant.checkpoint.names import expected_tensors
from klquant.errors import UserError

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PROVENANCE = "klquant.json"  # how klquant made a checkpoint, and the hashes of its shards
DESCRIPTIONS = ("tensors.json", "tensors.json.gz")
MAX_JSON = 200_000_000  # bytes; the 48B checkpoint's index has 2 MB
FLOATS = ("BF16", "F16", "F32")

Shapes = Mapping[str, tuple[str, tuple[int, ...]]]


def read_json(path: Path) -> dict:
    """A JSON object from a file, unpacked when its name ends in .gz. Raises UserError naming the file."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            data = file.read(MAX_JSON + 1)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; is {path.parent} a checkpoint folder?") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(data) > MAX_JSON:
        raise UserError(f"{path}: larger than {MAX_JSON // 10**6} MB; this is not the file it should be")
    value = parse_json(data, str(path))
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object")
    return value


def require_folder(folder: Path, otherwise: str = "no such folder") -> None:
    """Raises UserError where `folder` is a file, and with `otherwise` where it is not there."""
    if not folder.is_dir():
        raise UserError(f"{folder}: {'is a file; give the checkpoint folder' if folder.exists() else otherwise}")


def read_config(folder: Path) -> tuple[dict, KimiLinearConfig]:
    """config.json as it stands and as understood."""
    if folder.exists():
        require_folder(folder)
    raw = read_json(folder / CONFIG)
    return raw, KimiLinearConfig.from_dict(raw, str(folder / CONFIG))


def require_16_bits(raw: dict, folder: Path) -> None:
    """Raises UserError when config.json says that the checkpoint is quantized."""
    if raw.get("quantization_config") is not None:
        raise UserError(f"{folder / CONFIG}: this checkpoint is quantized already; give the 16-bit one")


def inside(folder: Path, name: str, where: str) -> Path:
    """The file `name` of `folder`. Raises UserError, naming `where`, when it would leave the folder.

    Links may lead to the `blobs` of a Hugging Face cache, which is how that cache lays out a snapshot.
    """
    plain = PurePosixPath(name).name == name == PureWindowsPath(name).name and name not in ("", "..")
    if not plain or not name.isprintable():
        raise UserError(f"{where}: {name!a} is not a plain file name; entries must stay in the checkpoint folder")
    path, home = folder / name, Path(os.path.realpath(folder))
    homes = [home, home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [home]
    if not any(Path(os.path.realpath(path)).is_relative_to(allowed) for allowed in homes):
        raise UserError(f"{where}: {name} links to a file outside the checkpoint folder; put the file itself there")
    return path


def shard_files(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """Shards in name order, and the index's weight_map (None for a single model.safetensors)."""
    if (folder / INDEX).exists():
        where = folder / INDEX
        weight_map = read_json(where).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map or not all(type(v) is str for v in weight_map.values()):
            raise UserError(f"{where}: weight_map is not an object of tensor name → file name")
        for name, file in weight_map.items():
            if not file.endswith(".safetensors"):
                raise UserError(f"{where}: tensor {name!a:.200} lies in {file!a}; only .safetensors files are read")
        return [inside(folder, file, str(where)) for file in sorted(set(weight_map.values()))], weight_map
    if (folder / SINGLE).exists():
        return [inside(folder, SINGLE, str(folder))], None
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        raise UserError(f"{folder}: holds pickled weights only; klquant reads safetensors only, convert it first")
    raise UserError(f"{folder}: neither {INDEX} nor {SINGLE} is there")


def read_shards(folder: Path) -> tuple[dict[str, TensorInfo], list[bytes]]:
    """Every tensor of the checkpoint (name → where it lies) and the shards' raw headers, in file order.

    Raises UserError where index and shards disagree: a tensor missing, in two shards, or not in the index.
    """
    paths, weight_map = shard_files(folder)
    tensors: dict[str, TensorInfo] = {}
    headers = []
    for path in paths:
        found, raw = read_header(path)
        headers.append(raw)
        for name, info in found.items():
            if name in tensors:
                raise UserError(f"{path}: tensor {name} is also in {tensors[name].shard.name}")
            tensors[name] = info
    for name, file in (weight_map or {}).items():
        if name not in tensors:
            raise UserError(f"{folder / file}: tensor {name!a:.200} is missing, though {INDEX} places it there")
        if tensors[name].shard.name != file:
            raise UserError(f"{tensors[name].shard}: tensor {name} is here, but {INDEX} places it in {file}")
    for name in tensors if weight_map is not None else ():
        if name not in weight_map:
            raise UserError(f"{tensors[name].shard}: tensor {name} is not listed in {INDEX}")
    return tensors, headers


def read_tensor_index(folder: Path) -> tuple[KimiLinearConfig, dict[str, tuple[str, tuple[int, ...]]]]:
    """Config and name → (dtype, shape) of an unquantized checkpoint or a description; no weights are read.

    Raises UserError when the tensors are not those of the config.
    """
    folder = Path(folder)
    raw, config = read_config(folder)
    description = next((folder / file for file in DESCRIPTIONS if (folder / file).exists()), None)
    if (folder / INDEX).exists() or (folder / SINGLE).exists() or description is None:
        where = str(folder)
        tensors = {name: (info.dtype, info.shape) for name, info in read_shards(folder)[0].items()}
    else:
        where = str(description)
        tensors = {name: _described(name, entry, where) for name, entry in read_json(description).items()}
    require_16_bits(raw, folder)
    check_tensors(config, tensors, where)
    return config, tensors


def _described(name: str, entry, where: str) -> tuple[str, tuple[int, ...]]:
    shape = entry.get("shape") if isinstance(entry, dict) else None
    if not isinstance(shape, list) or "dtype" not in entry:
        raise UserError(f"{where}: tensor {name!a:.200}: expected an object with dtype and shape")
    return str(entry["dtype"]), tuple(shape)


def check_tensors(config: KimiLinearConfig, tensors: Shapes, where: str) -> None:
    """Raises UserError on the first of `tensor_problems` of an unquantized checkpoint, and counts the others."""
    expected = {name: (FLOATS, shape) for name, shape in expected_tensors(config).items()}
    raise_first(list(tensor_problems(expected, tensors)), where)


def raise_first(problems: list[str], where: str) -> None:
    """Raises UserError on the first problem, if any, and counts the others."""
    if problems:
        more = f" (and {len(problems) - 1} more such problems)" if len(problems) > 1 else ""
        raise UserError(f"{where}: {problems[0]}{more}")


def tensor_problems(expected: Mapping[str, tuple[tuple[str, ...], tuple[int, ...]]], tensors: Shapes) -> Iterator[str]:
    """One line a tensor that is missing, unknown, or of a wrong shape or dtype. `expected`: name → (dtypes, shape)."""
    for name, (dtypes, shape) in expected.items():
        if name not in tensors:
            yield f"tensor {name} is missing"
            continue
        dtype, actual = tensors[name]
        if actual != shape:
            yield f"tensor {name} has shape {list(actual)}, but {CONFIG} implies {list(shape)}"
        elif dtype not in dtypes:
            known = dtype if dtype in ITEM_BYTES else f"unknown ({dtype!a:.40})"
            yield f"tensor {name} has dtype {known}, expected {' or '.join(dtypes)}"
    for name in tensors:
        if name not in expected:
            yield f"tensor {name!a:.200} is not part of a Kimi-Linear checkpoint of this {CONFIG}"
