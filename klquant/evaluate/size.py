"""How large a checkpoint is: on disk, in bits a weight, and in memory when it runs."""

from collections import Counter
from math import prod
from pathlib import Path

from klquant.checkpoint.config import KimiLinearConfig
from klquant.checkpoint.hub import model_name
from klquant.checkpoint.names import TensorClass, expected_tensors, parse_name
from klquant.checkpoint.quantized import QuantizedReader
from klquant.evaluate.result import Bits, Checkpoint, MemoryAt, Size
from klquant.recipe.memory import WeightSizes, contexts, predict_memory

KEPT = "kept"


def describe(reader: QuantizedReader, folder: Path) -> Checkpoint:
    """What a result says about a checkpoint. Reads samples of the weights for the fingerprint."""
    schemes = Counter(KEPT if spec is None else str(spec) for spec in reader.specs.values())
    return Checkpoint(
        name=model_name(folder), fingerprint=reader.files.fingerprint(), scheme=dict(sorted(schemes.items())),
        size=size(reader),
    )  # fmt: skip


def size(reader: QuantizedReader) -> Size:
    infos = reader.files.tensors
    disk = sum(path.stat().st_size for path in {info.shard for info in infos.values()})
    return size_of(reader.config, {name: info.nbytes for name, info in infos.items()}, disk)


def size_of(config: KimiLinearConfig, stored: dict[str, int], disk: int) -> Size:
    """`stored`: bytes of each stored tensor, by its name or by the weight's that it is part of."""
    nbytes, weights = Counter(), Counter()
    for name, shape in expected_tensors(config).items():
        weights[parse_name(name, config).cls] += prod(shape)
    for name, count in stored.items():
        module, _, part = name.rpartition(".")
        full = f"{module}.weight" if part.startswith("weight_") else name
        nbytes[parse_name(full, config).cls] += count
    always = [c for c in TensorClass if c not in (TensorClass.ROUTED_EXPERTS, TensorClass.EMBEDDING)]

    def bits(classes: list[TensorClass]) -> float:
        return 8 * sum(nbytes[c] for c in classes) / sum(weights[c] for c in classes)

    return Size(
        disk=disk,
        weights=weights.total(),
        bits=Bits(routed_experts=bits([TensorClass.ROUTED_EXPERTS]), always_active=bits(always),
                  whole=bits(list(TensorClass))),
        memory=_memory(config, stored),
    )  # fmt: skip


def _memory(config: KimiLinearConfig, stored: dict[str, int]) -> list[MemoryAt]:
    """At each context: all on the card with a 16-bit cache, then the least: embedding off, cache at 8 bits."""
    sizes = WeightSizes.of(stored, config.num_layers)
    rows = []
    for bits in (16, 8):
        for context in contexts(config):
            m = predict_memory(config, sizes, context, cache_bits=bits, embedding_on_cpu=bits == 8)
            rows.append(MemoryAt(
                context=m.context, cache_bits=m.cache_bits, embedding_on_cpu=m.embedding_on_cpu, weights=m.weights,
                latent_cache=m.latent_cache, kda_state=m.kda_state, workspace_estimate=m.workspace,
                runtime_estimate=m.runtime, total=m.total, fits=m.fits(),
            ))  # fmt: skip
    return rows
