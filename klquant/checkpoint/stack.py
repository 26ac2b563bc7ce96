"""Many weights of a checkpoint at once: read side by side on the host, unpacked together on the device.

A layer of 256 experts is thousands of small tensors. One at a time, Python and copies to the device would take longer
than the bytes do.
"""

from collections.abc import Sequence
from concurrent.futures import Executor

import torch
from torch import Tensor

from klquant.checkpoint.dtypes import DTYPES
from klquant.checkpoint.quantized import QuantizedReader, unpack_parts
from klquant.checkpoint.reader import is_finite
from klquant.core.grid import Quantized


def read_stack(
    reader: QuantizedReader, modules: Sequence[str], device: torch.device, pool: Executor
) -> Quantized | Tensor:
    """The weights [N, K] of `modules`, which share shape and grid, as [len(modules), N, K] on `device`.

    Plain ones come in the dtype they are stored in. The reader has been checked (`check_complete`). Raises UserError
    naming the tensor that is damaged.
    """
    spec, cpu = reader.spec(modules[0]), torch.device("cpu")

    def read(part: str, where: torch.device = device) -> Tensor:
        return _read(reader, [f"{module}.{part}" for module in modules], where, pool)

    if spec is None:
        return read("weight")
    read("weight_shape", cpu)  # for its check
    zero = None if spec.symmetric else read("weight_zero_point")
    return unpack_parts(read("weight_packed"), read("weight_scale"), zero, spec, *reader.shape(modules[0]))


def _read(reader: QuantizedReader, names: list[str], device: torch.device, pool: Executor) -> Tensor:
    """Tensors of one shape, stacked on `device`, their values checked there all at once."""
    infos = [reader.files.info(name) for name in names]
    dtype = DTYPES[infos[0].dtype]
    for info in infos:
        dtype = torch.promote_types(dtype, DTYPES[info.dtype])
    out = torch.empty(len(names), *infos[0].shape, dtype=dtype, pin_memory=device.type == "cuda")

    def fill(i: int) -> None:
        if DTYPES[infos[i].dtype] == dtype:
            reader.files.read(names[i], out=out[i])
        else:
            out[i] = reader.files.read(names[i])

    list(pool.map(fill, range(len(names))))
    stack = out.to(device)
    if _suspicious(names[0].rpartition(".")[2], stack):
        for name, tensor in zip(names, stack, strict=True):
            reader.check_values(name, tensor)
    return stack


def _suspicious(part: str, stack: Tensor) -> bool:
    """Whether a closer look at each tensor is due. A `weight_shape` always gets one: it costs nothing."""
    if stack.is_floating_point():
        return not is_finite(stack) or (part == "weight_scale" and not bool((stack > 0).all()))
    return part == "weight_shape"
