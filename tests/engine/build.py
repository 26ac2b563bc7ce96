"""Quantized checkpoints in several formats, and the engine's weights of them."""

from collections.abc import Callable
from pathlib import Path

import torch

from klquant.checkpoint.names import TensorClass, TensorKey, expected_tensors
from klquant.checkpoint.quantized import QuantizedReader, quantization_config
from klquant.core.spec import WeightSpec
from klquant.engine.build import OneDevice
from klquant.engine.load import load_weights
from klquant.engine.weights import EngineWeights
from klquant.model.forward import Model
from klquant.model.weights import DictSource
from tests.checkpoint.build import by_name, int4_rule, quantized_checkpoint
from tests.recipe.build import WIDE
from tests.tiny import tiny_config, tiny_tensors, write_checkpoint

CPU = torch.device("cpu")
INT3, INT4, INT8 = (WeightSpec(bits=bits, group_size=32) for bits in (3, 4, 8))
ROW, ASYM = WeightSpec(bits=8, group_size=-1), WeightSpec(bits=4, group_size=32, symmetric=False)
Rule = Callable[[TensorKey], WeightSpec | None]


def experts_only(key: TensorKey) -> WeightSpec | None:
    """As other tools publish it: asymmetric experts, all else in 16 bits."""
    return ASYM if key.cls == TensorClass.ROUTED_EXPERTS else None


def everything(key: TensorKey) -> WeightSpec | None:
    """Every linear, gates, router and kv_b too; INT3 experts."""
    return INT3 if key.cls == TensorClass.ROUTED_EXPERTS else INT4


def mixed(key: TensorKey) -> WeightSpec | None:
    """No two that a kernel joins are alike: q, k, v; gate and up; the experts of a layer."""
    if key.cls == TensorClass.ROUTED_EXPERTS:
        return (INT4, ASYM, INT8)[key.expert % 3] if key.role != "w2" else (INT3, ROW)[key.layer % 2]
    if key.cls == TensorClass.SHARED_EXPERTS:
        return {"gate_proj": INT4, "up_proj": None, "down_proj": ROW}[key.role]
    return {"q_proj": INT4, "k_proj": INT8, "gate_proj": ROW, "up_proj": ASYM, "kv_b_proj": INT8}.get(key.role)


RULES: dict[str, Rule | None] = {
    "bf16": None, "int4": int4_rule, "experts only": experts_only, "everything": everything, "mixed": mixed,
}  # fmt: skip
# The narrow shape has parts that no fused weight can hold, the wide one none.
SHAPES = {"narrow": {}, "wide": WIDE}


def raw_config(shape: str) -> dict:
    return tiny_config(**SHAPES[shape])


def checkpoint(folder: Path, rule: str, shape: str = "narrow") -> Path:
    """A tiny checkpoint in one of the formats of RULES."""
    raw = raw_config(shape)
    if rule == "bf16":
        return write_checkpoint(folder, raw, tiny_tensors(raw))
    quantized_checkpoint(folder, raw, RULES[rule], describe=by_name if rule == "mixed" else quantization_config)
    return folder


def load(folder: Path, packed: bool = True, dtype: torch.dtype = torch.float32, **options) -> EngineWeights:
    reader = QuantizedReader.open(folder)
    return load_weights(reader, OneDevice(CPU, reader.config.num_layers, packed), dtype, **options)


def general_path(weights: EngineWeights) -> Model:
    """The engine's weights as `klquant.model` runs them."""
    return Model(weights.cfg, weights.embedding_VC, tuple(layer.model for layer in weights.layers), weights.head)


# What is held in 16 bits although it is stored on a grid, and so with the reader's rounding; the last in `mixed`.
ROUNDED = ("kv_b_proj", "f_b_proj", "g_b_proj", "block_sparse_moe.gate", "shared_experts.gate_proj")


def exact_model(folder: Path) -> Model:
    """The FP32 model with weights as code · scale without rounding, but for ROUNDED."""
    reader = QuantizedReader.open(folder)
    tensors = {}
    for name in expected_tensors(reader.config):
        module = name.removesuffix(".weight")
        rounded = module.endswith(ROUNDED[:-1] if "mixed" not in folder.name else ROUNDED)
        exact = reader.spec(module) is not None and not rounded
        tensors[name] = reader.quantized(module).decode() if exact else reader.weight(name, torch.float32)
    return Model.load(DictSource(reader.config, tensors), torch.float32, CPU)
