"""Small quantized checkpoints, written with klquant's own functions by plain rounding."""

import json
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from klquant.checkpoint.config import KimiLinearConfig
from klquant.checkpoint.index import PROVENANCE
from klquant.checkpoint.names import TensorClass, TensorKey, parse_name, place_of
from klquant.checkpoint.quantized import compress, quantization_config
from klquant.checkpoint.scheme import linear_modules
from klquant.checkpoint.writer import plan_shards, write_index, write_json, write_safetensors
from klquant.core.grid import Quantized, encode
from klquant.core.spec import WeightSpec
from tests.tiny import tiny_tensors, write_tokenizer

INT4 = WeightSpec(bits=4, group_size=32)
INT8 = WeightSpec(bits=8, group_size=32)
_INT8_CLASSES = (
    TensorClass.SHARED_EXPERTS, TensorClass.DENSE_MLP, TensorClass.KDA_PROJ, TensorClass.MLA_PROJ, TensorClass.HEAD,
)  # fmt: skip


def int4_rule(key: TensorKey) -> WeightSpec | None:
    """The default recipe in small: routed experts INT4, the always-active linears INT8, the rest kept."""
    if key.cls == TensorClass.ROUTED_EXPERTS:
        return INT4
    return INT8 if key.cls in _INT8_CLASSES else None


def assign(
    config: KimiLinearConfig, rule: Callable[[TensorKey], WeightSpec | None]
) -> tuple[dict[str, WeightSpec], list[str]]:
    """Module → spec of the quantized linears, and the names of the kept ones."""
    specs = {module: rule(parse_name(f"{module}.weight", config)) for module in linear_modules(config)}
    return {m: s for m, s in specs.items() if s is not None}, [m for m, s in specs.items() if s is None]


def round_to_grid(w_NK: Tensor, spec: WeightSpec) -> Quantized:
    """Min-max scales and nearest codes."""
    n, k = w_NK.shape
    groups = w_NK.float().view(n, spec.groups(k), spec.width(k))
    if spec.symmetric:
        scale = (groups.abs().amax(-1).clamp_min(1e-6) / -spec.qmin).bfloat16()
        zero = None
    else:
        low, high = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
        scale = ((high - low).clamp_min(1e-6) / (spec.qmax - spec.qmin)).bfloat16()
        zero = (spec.qmin - low / scale.float()).round().clamp(spec.qmin, spec.qmax).to(torch.int8)
    return Quantized(spec, encode(w_NK, scale, zero, spec), scale, zero)


def quantized_checkpoint(
    folder: Path, raw: dict, rule: Callable[[TensorKey], WeightSpec | None] = int4_rule, max_bytes: int = 1 << 30,
    describe: Callable[..., dict] = quantization_config,
) -> dict[str, Tensor]:  # fmt: skip
    """Write a quantized folder with provenance; returns the dequantized weights under their hub names.

    `describe` makes its quantization_config of the specs, the names that are kept, and the config.
    """
    folder.mkdir(parents=True)
    config = KimiLinearConfig.from_dict(raw)
    assignments, kept = assign(config, rule)
    stored, plain = {}, {}
    for name, tensor in tiny_tensors(raw).items():
        module = name.removesuffix(".weight")
        if module in assignments:
            weight = round_to_grid(tensor, assignments[module])
            stored |= compress(module, weight)
            plain[name] = weight.decode(torch.bfloat16)
        else:
            stored[name] = plain[name] = tensor
    sizes = {name: tensor.nbytes for name, tensor in stored.items()}
    units = groupby(sizes.items(), lambda item: place_of(item[0]).unit)
    shards = plan_shards([list(unit) for _, unit in units], max_bytes)
    records = [write_safetensors(folder / s.file, {n: stored[n] for n in s.names}, {"format": "pt"}) for s in shards]
    write_index(folder, shards, sizes)
    config_json = raw | {"quantization_config": describe(assignments, kept, config)}
    write_json(folder / "config.json", config_json)
    write_json(folder / PROVENANCE, {"shards": {r.file: {"sha256": r.sha256, "bytes": r.nbytes} for r in records}})
    write_tokenizer(folder, raw["vocab_size"])
    return plain


def by_name(assignments: dict[str, WeightSpec], kept: list[str], config: KimiLinearConfig) -> dict:
    """A quantization_config as another tool may write it: every module by its name, a format for every group."""
    targets: dict[WeightSpec, list[str]] = {}
    for module, spec in assignments.items():
        targets.setdefault(spec, []).append(module)
    groups = {}
    for i, (spec, names) in enumerate(targets.items()):
        weights = {"num_bits": spec.bits, "type": "int", "symmetric": spec.symmetric, "dynamic": False}
        weights |= (
            {"strategy": "channel"} if spec.group_size < 0 else {"strategy": "group", "group_size": spec.group_size}
        )
        groups[f"group_{i}"] = {"targets": names, "format": "pack-quantized", "weights": weights}
    return {"quant_method": "compressed-tensors", "format": "mixed-precision", "ignore": kept, "config_groups": groups}


def edit_json(path: Path, change: Callable[[dict], None]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))
