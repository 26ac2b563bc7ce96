"""A checkpoint of noise in the shape of Kimi-Linear-48B, its first layers or all, and token windows of noise."""

import json
import os
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

import klquant
from klquant.calibrate.text import Calibration
from klquant.checkpoint.config import KimiLinearConfig
from klquant.checkpoint.dtypes import DTYPES
from klquant.checkpoint.header import TensorInfo
from klquant.checkpoint.index import CONFIG
from klquant.checkpoint.names import expected_tensors, parse_name, place_of
from klquant.checkpoint.reader import CheckpointReader
from klquant.checkpoint.writer import plan_shards, write_index, write_json, write_safetensors
from klquant.pipeline.text import Text

KIMI_48B = Path(klquant.__file__).parent / "engine" / "configs" / "kimi-linear-48b.json"
SHARD_BYTES = 5_000_000_000
# The first layer of each kind.
KINDS = {"dense": 0, "kda": 1, "mla": 3}
# Narrow, with few experts and a small vocabulary: to try a benchmark out.
SMALL = {
    "hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 128, "num_experts": 32, "vocab_size": 512,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
}  # fmt: skip


def make_config(layers: int | None = None, small: bool = False) -> dict:
    """The 48B's config.json, cut to its first `layers` layers: KDA with a dense MLP, then layers with experts, every
    fourth of all MLA."""
    raw = json.loads(KIMI_48B.read_text())
    linear = dict(raw["linear_attn_config"])
    if small:
        raw, linear = raw | SMALL, linear | {"num_heads": 2}
    if layers is not None:
        for kind in ("full_attn_layers", "kda_layers"):  # both count from 1
            linear[kind] = [layer for layer in linear[kind] if layer <= layers]
        raw["num_hidden_layers"] = layers
    return raw | {"linear_attn_config": linear}


def kind_of(config: KimiLinearConfig, layer: int) -> str:
    return "mla" if config.is_mla(layer) else "kda" if config.is_moe(layer) else "dense"


@dataclass(frozen=True)
class ColdReader(CheckpointReader):
    """What was read is dropped from the page cache: 98 GB do not stay there, and a few layers read again would."""

    def read(self, name: str, *, out: Tensor | None = None) -> Tensor:
        tensor, info = super().read(name, out=out), self.info(name)
        drop_cached(info.shard, info.offset, info.nbytes)
        return tensor


def drop_cached(file: Path, offset: int = 0, nbytes: int = 0) -> None:
    """Let the system forget part of a file that is on the disk (all of it with `nbytes` 0)."""
    handle = os.open(file, os.O_RDONLY)
    try:
        os.posix_fadvise(handle, offset, nbytes, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


def open_checkpoint(folder: Path, raw: dict, device: torch.device, small: bool = False) -> ColdReader:
    """A hub-format checkpoint with the config `raw`, of noise made on `device`; what lies in `folder` already is used.

    On the disk there is one layer of each kind, which every layer of that kind reads its own tensors from.
    """
    if not (folder / CONFIG).exists():
        _write_kinds(folder, make_config(max(KINDS.values()) + 1, small), device)
    stored, config = CheckpointReader.open(folder), KimiLinearConfig.from_dict(raw, "synthetic")
    tensors = {}
    for name in expected_tensors(config):
        parts = name.split(".")
        if parts[1] == "layers":
            parts[2] = str(KINDS[kind_of(config, int(parts[2]))])
        tensors[name] = replace(stored.info(".".join(parts)), name=name)
    for file in sorted({info.shard for info in tensors.values()}):
        drop_cached(file)
    return ColdReader(folder, raw, config, tensors, stored.header_hash)


def bytes_of(tensors: dict[str, TensorInfo]) -> tuple[int, int]:
    """Bytes of a checkpoint as it is read, and on the disk."""
    places = {(info.shard, info.offset): info.nbytes for info in tensors.values()}
    return sum(info.nbytes for info in tensors.values()), sum(places.values())


def _write_kinds(folder: Path, raw: dict, device: torch.device) -> None:
    config = KimiLinearConfig.from_dict(raw, "synthetic")
    kept = {None, *KINDS.values()}
    shapes = {name: shape for name, shape in expected_tensors(config).items() if place_of(name).layer in kept}
    sizes = {name: torch.Size(shape).numel() * _dtype(name).itemsize for name, shape in shapes.items()}
    folder.mkdir(parents=True, exist_ok=True)
    gen = torch.Generator(device).manual_seed(0)
    units = groupby(sizes.items(), lambda item: place_of(item[0]).unit)
    shards = plan_shards([list(unit) for _, unit in units], SHARD_BYTES)
    for shard in shards:
        tensors = {name: noise(name, shapes[name], config, device, gen) for name in shard.names}
        write_safetensors(folder / shard.file, tensors, {"format": "pt"})
    write_index(folder, shards, sizes)
    write_json(folder / CONFIG, raw)


def noise(
    name: str, shape: tuple[int, ...], config: KimiLinearConfig, device: torch.device, gen: torch.Generator
) -> Tensor:
    """A random tensor on the CPU, at a scale that keeps activations sane."""
    role = parse_name(name, config).role
    value = torch.randn(shape, generator=gen, device=device)
    if "norm" in role:
        value = 1 + 0.1 * value
    elif role == "e_score_correction_bias":
        value = 0.05 * value
    elif role not in ("A_log", "dt_bias", "embed_tokens"):
        value = value * shape[-1] ** -0.5
    return value.to(_dtype(name)).cpu()  # in one step a GPU would hand out FP32


def noise_text(config: KimiLinearConfig, windows: int, length: int) -> Text:
    """Calibration windows of random tokens."""
    ids = torch.randint(config.vocab_size, (windows, length), generator=torch.Generator().manual_seed(0))
    calibration = Calibration(ids, torch.zeros(windows, dtype=torch.int64), (), f"noise {windows}", ())
    return Text("noise", calibration, None, windows)


def _dtype(name: str) -> torch.dtype:
    return DTYPES["F32" if name.rpartition(".")[2] in ("A_log", "dt_bias", "e_score_correction_bias") else "BF16"]
