"""Launches recorded without a GPU, and compiled for a card that is not here with Triton's own compiler."""

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from klquant.core.grid import Quantized
from klquant.core.spec import WeightSpec

# Compute capability → shared memory a block may have, in KiB.
CARDS = {80: 163, 86: 99, 89: 99, 90: 227}
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32",
            torch.int64: "*i64", torch.int16: "*i16", torch.int8: "*i8"}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """A kernel with the types and constants it is specialized for."""

    kernel: object
    signature: tuple[tuple[str, str | tuple[str, ...]], ...]
    constants: tuple[tuple[str, object], ...]
    divisible: tuple[tuple[str | int, ...], ...]
    warps: int
    registers: int | None = None
    stages: int = 3

    def __str__(self) -> str:
        shape = " ".join(f"{name}={value}" for name, value in self.constants if name.isupper())
        return f"{self.kernel.__name__} {shape} warps={self.warps} {dict(self.signature).get('x', '')}".strip()


def record(run: Callable[[], object], monkeypatch) -> Iterator[Launch]:
    """The launches that `run` makes; its tensors may be on the meta device."""
    from triton.runtime.jit import JITFunction

    calls = []
    with monkeypatch.context() as patch:
        patch.setattr(
            JITFunction, "run", lambda kernel, *args, grid, warmup, **options: calls.append((kernel, args, options))
        )
        run()
    for kernel, args, options in calls:
        yield _launch(kernel, args, options)


def _launch(kernel, args: tuple, options: dict[str, object]) -> Launch:
    warps, registers = options.pop("num_warps", 4), options.pop("maxnreg", None)
    stages = options.pop("num_stages", 3)
    fixed = {p.name for p in kernel.params if p.is_constexpr}
    unaligned = {p.name for p in kernel.params if p.do_not_specialize or p.do_not_specialize_on_alignment}
    values = dict(zip(kernel.arg_names, args, strict=False)) | options
    signature, constants, divisible = {}, {}, []

    def kind(value: object, path: tuple[str | int, ...]) -> str | tuple[str, ...]:
        """What Triton calls its type; notes by path what is known of the value."""
        if isinstance(value, tuple):
            return tuple(kind(item, (*path, i)) for i, item in enumerate(value))
        if isinstance(value, torch.Tensor):
            divisible.append(path)
            return POINTERS[value.dtype]
        if isinstance(value, int) and path[0] not in fixed and value != 1:
            if value % 16 == 0 and path[0] not in unaligned:
                divisible.append(path)
            return "i32"
        if isinstance(value, float):
            return "fp32"
        constants[path[0]] = value
        return "constexpr"

    for name in kernel.arg_names:
        signature[name] = kind(values[name], (name,))
    return Launch(
        kernel, tuple(signature.items()), tuple(constants.items()), tuple(divisible), warps, registers, stages
    )


@dataclass(frozen=True)
class Resources:
    """`stray`: instructions that compute with the stack pointer though nothing is on the stack: ptxas 12.8 at times
    takes it for a value that it forgot to compute, a matrix descriptor of wgmma's for instance."""

    registers: int
    shared: int
    spilled: int
    stray: int


def compile_for(launch: Launch, card: int) -> Resources:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    place = {name: i for i, name in enumerate(launch.kernel.arg_names)}
    source = (GluonASTSource if launch.kernel.is_gluon() else ASTSource)(
        launch.kernel, dict(launch.signature), {(place[name],): value for name, value in launch.constants},
        {(place[name], *rest): [["tt.divisibility", 16]] for name, *rest in launch.divisible},
    )  # fmt: skip
    options = {"num_warps": launch.warps, "maxnreg": launch.registers, "num_stages": launch.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", card, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = dict(item.split(":") for item in report.split("REG:")[1].split("\n")[0].join(["REG:", ""]).split())
    spilled = int(used["STACK"]) + int(used["LOCAL"])
    stray = 0 if spilled else len(re.findall(r", R1\b", listing))
    return Resources(int(used["REG"]), compiled.metadata.shared, spilled, stray)


def meta_weight(shape: tuple[int, ...], bits: int, group: int = 128, symmetric: bool = True):
    """A weight without values, of the model's own size."""
    if bits == 16:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")
    spec = WeightSpec(bits=bits, group_size=group, symmetric=symmetric)
    groups = (*shape[:-1], spec.groups(shape[-1]))
    codes, scale = torch.empty(shape, dtype=torch.int8, device="meta"), torch.empty(groups, device="meta").bfloat16()
    return Quantized(spec, codes, scale, None if symmetric else torch.empty(groups, dtype=torch.int8, device="meta"))
