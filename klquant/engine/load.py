"""From a checkpoint to the engine's weights: streamed, packed on the device, one layer's experts a few at a time."""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from klquant.checkpoint.config import KimiLinearConfig
from klquant.checkpoint.quantized import QuantizedReader, packed_layout
from klquant.checkpoint.stack import read_stack
from klquant.core.grid import Quantized
from klquant.core.spec import WeightSpec
from klquant.engine.build import Places, build_weights
from klquant.engine.placement import CPU, Placement, plan_placement
from klquant.engine.sizes import Outline, held_sizes
from klquant.engine.weights import EngineWeights
from klquant.errors import UserError

# Sizes that are the extent of a block in a Triton kernel.
_BLOCKS = {
    "linear_attn_config.head_dim": "kda_dim", "kv_lora_rank": "kv_rank", "qk_rope_head_dim": "qk_rope_dim",
    "qk_nope_head_dim": "qk_nope_dim", "v_head_dim": "v_dim",
}  # fmt: skip
LEAST_BLOCK = 16  # of a product on tensor cores
# Threads that read files: what they wait for is the page cache or a disk.
READERS = min(8, os.cpu_count() or 1)

# Called with (bytes read so far, bytes in all).
Progress = Callable[[int, int], None]


def default_dtype(devices: Mapping[torch.device, int]) -> torch.dtype:
    """Of the activations: BF16 on GPUs; FP32 on a CPU, where the reference path runs."""
    return torch.float32 if CPU in devices else torch.bfloat16


def place(
    outline: Outline, devices: Mapping[torch.device, int], dtype: torch.dtype, *, context: int, sequences: int = 1,
    prefixes: int = 0, cache_bits: int = 16, host: int = 0,
) -> Placement:  # fmt: skip
    """Where a model goes (`plan_placement`). On a CPU weights are plain tensors of `dtype` if they fit so. host: bytes
    of experts that may lie in the host's memory, where cards have no room for them.

    Raises UserError as well where the model has sizes that the kernels of a GPU cannot serve.
    """
    options = {
        "context": context, "sequences": sequences, "prefixes": prefixes, "cache_bits": cache_bits,
        "activation_bytes": dtype.itemsize,
    }  # fmt: skip
    if CPU in devices:
        try:
            sizes = held_sizes(outline, dtype, packed=False)
            return plan_placement(outline.config, sizes, devices, packed=False, **options)
        except UserError:  # unpacked it does not fit; packed it is slower still, and may
            pass
    else:
        _require_kernels(outline.config)
    host = 0 if CPU in devices else host
    return plan_placement(outline.config, held_sizes(outline, dtype), devices, host=host, **options)


def _require_kernels(config: KimiLinearConfig) -> None:
    """The gate's rank is KDA's head size in this architecture, and needs no check of its own."""
    for key, name in _BLOCKS.items():
        size = getattr(config, name)
        if size < LEAST_BLOCK or size & (size - 1):
            raise UserError(
                f"config.json: {key} is {size}; klquant's GPU kernels take powers of two from {LEAST_BLOCK} on; "
                "use --devices cpu"
            )


def load_weights(
    reader: QuantizedReader, places: Places, dtype: torch.dtype, progress: Progress | None = None
) -> EngineWeights:
    """Read a checkpoint, in 16 bits or pack-quantized, into what the engine holds for activations of `dtype`.

    Raises UserError, naming the tensor, for one that is missing, of a wrong shape or damaged.
    """
    reader.check_complete()
    with ThreadPoolExecutor(READERS) as pool:
        return build_weights(_Checkpoint(reader, pool, progress), places, dtype)


@dataclass
class _Checkpoint:
    """A reader as a source of weights that counts what it reads."""

    reader: QuantizedReader
    pool: Executor
    progress: Progress | None
    done: int = 0
    total: int = field(init=False)

    def __post_init__(self) -> None:
        self.total = sum(info.nbytes for info in self.reader.files.tensors.values())

    @property
    def config(self) -> KimiLinearConfig:
        return self.reader.config

    def spec(self, module: str) -> WeightSpec | None:
        return self.reader.spec(module)

    def stack(self, modules: Sequence[str], device: torch.device) -> Quantized | Tensor:
        found = read_stack(self.reader, modules, device, self.pool)
        self._count([f"{module}.weight" for module in modules])
        return found

    def tensor(self, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
        found = self.reader.weight(name, dtype).to(device)
        self._count([name])
        return found

    def _count(self, names: Sequence[str]) -> None:
        for name in names:
            module = name.removesuffix(".weight")
            spec = self.reader.spec(module)
            stored = [name] if spec is None else packed_layout(module, self.reader.shape(module), spec)
            self.done += sum(self.reader.files.info(part).nbytes for part in stored)
        if self.progress:
            self.progress(self.done, self.total)
