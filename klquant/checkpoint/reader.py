"""Lazy reading of a checkpoint: headers at once, each tensor's bytes when asked for, nothing mapped or held open."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from klquant.checkpoint.config import KimiLinearConfig
from klquant.checkpoint.dtypes import DTYPES
from klquant.checkpoint.header import TensorInfo
from klquant.checkpoint.index import CONFIG, check_tensors, read_config, read_shards, require_16_bits
from klquant.errors import UserError

CHUNK = 1 << 24  # bytes read at a time where a tensor need not be whole
# A fingerprint covers shards up to this size whole, larger ones by samples of every tensor.
WHOLE = 1 << 26
SAMPLE = 1 << 12


@dataclass(frozen=True)
class CheckpointReader:
    """A checkpoint folder opened for reading: `tensors` maps each name to where it lies.

    It is also a source of weights for the model (`config`, `weight`). Every failure is a UserError that names the file
    and, where there is one, the tensor.
    """

    folder: Path
    raw_config: dict
    config: KimiLinearConfig
    tensors: dict[str, TensorInfo]
    header_hash: str

    @classmethod
    def open(cls, folder: Path) -> "CheckpointReader":
        """Read config.json, the index and every shard's header; no weights."""
        folder = Path(folder)
        raw, config = read_config(folder)
        tensors, headers = read_shards(folder)
        digest = hashlib.sha256()
        for header in headers:
            digest.update(hashlib.sha256(header).digest())
        return cls(folder, raw, config, tensors, digest.hexdigest())

    def check_complete(self) -> None:
        """Raises UserError unless the tensors are exactly those of an unquantized model of this config."""
        shapes = {name: (info.dtype, info.shape) for name, info in self.tensors.items()}
        check_tensors(self.config, shapes, str(self.folder))

    def require_16_bits(self) -> None:
        """Raises UserError when the checkpoint is quantized."""
        require_16_bits(self.raw_config, self.folder)

    def info(self, name: str) -> TensorInfo:
        """Where a tensor lies. Raises UserError when the checkpoint has no tensor of that name."""
        if name not in self.tensors:
            raise UserError(f"{self.folder}: tensor {name} is missing")
        return self.tensors[name]

    def read(self, name: str, *, out: Tensor | None = None) -> Tensor:
        """The tensor as stored, on the CPU; into `out` (contiguous, same shape and dtype, e.g. pinned) when given."""
        info = self.info(name)
        if out is None:
            out = torch.empty(info.shape, dtype=DTYPES[info.dtype])
        assert out.dtype == DTYPES[info.dtype] and out.shape == info.shape and out.is_contiguous(), name
        if info.nbytes:
            _fill(info, out.view(-1).view(torch.uint8), 0)
        return out

    def chunks(self, name: str) -> Iterator[Tensor]:
        """The tensor's values in storage order, flat and a few MB at a time."""
        info = self.info(name)
        for start in range(0, info.nbytes, CHUNK):
            part = torch.empty(min(CHUNK, info.nbytes - start), dtype=torch.uint8)
            _fill(info, part, start)
            yield part.view(DTYPES[info.dtype])

    def weight(self, name: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
        """The tensor on `device`, converted to `dtype` there. Raises UserError when a value is NaN or infinite."""
        tensor = self.read(name).to(device)
        self.require_finite(name, tensor)
        return tensor.to(dtype)

    def require_finite(self, name: str, tensor: Tensor) -> None:
        """Raises UserError naming shard and tensor when a value is NaN or infinite."""
        if not is_finite(tensor):
            raise UserError(f"{self.info(name).shard}: tensor {name} holds NaN or infinite values; the file is damaged")

    def fingerprint(self) -> str:
        """SHA-256 (hex) that changes with the weights: config, headers, and the content of every shard.

        Shards up to 64 MB count whole, larger ones by 4 KiB at the start and in the middle of each tensor, so that
        98 GB take seconds.
        """
        digest = hashlib.sha256()
        try:
            digest.update(hashlib.sha256((self.folder / CONFIG).read_bytes()).digest())
        except OSError as error:
            raise UserError(f"{self.folder / CONFIG}: cannot be read: {error.strerror}") from None
        digest.update(self.header_hash.encode())
        shards: dict[Path, list[TensorInfo]] = {}
        for info in self.tensors.values():
            shards.setdefault(info.shard, []).append(info)
        for path, infos in sorted(shards.items()):
            digest.update(path.name.encode())
            _hash_shard(path, infos, digest)
        return digest.hexdigest()


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    if not tensor.numel():
        return True
    low, high = torch.aminmax(tensor)  # NaN wins in both, so two values tell of all
    return bool(torch.isfinite(low) and torch.isfinite(high))


def _fill(info: TensorInfo, buffer: Tensor, start: int) -> None:
    """Read `buffer.numel()` bytes of the tensor, from its byte `start`, into a flat uint8 tensor."""
    view = memoryview(buffer.numpy())
    try:
        with info.shard.open("rb", buffering=0) as file:
            file.seek(info.offset + start)
            filled = 0
            while filled < len(view):
                count = file.readinto(view[filled:])
                if not count:
                    raise UserError(f"{info.shard}: tensor {info.name}: the file ends inside it; it was truncated")
                filled += count
    except OSError as error:
        raise UserError(f"{info.shard}: tensor {info.name}: cannot be read: {error.strerror}") from None


def _hash_shard(path: Path, infos: list[TensorInfo], digest) -> None:
    try:
        with path.open("rb", buffering=0) as file:
            size = path.stat().st_size
            digest.update(size.to_bytes(8, "little"))
            if size <= WHOLE:
                while block := file.read(CHUNK):
                    digest.update(block)
                return
            for info in sorted(infos, key=lambda info: info.offset):
                for at in (info.offset, info.offset + info.nbytes // 2):
                    file.seek(at)
                    digest.update(file.read(min(SAMPLE, info.nbytes)))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
