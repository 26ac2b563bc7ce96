"""What a Gluon kernel computes, in torch on a CPU: Triton's interpreter does not know Gluon.

Layouts mean nothing here. Copies to shared memory arrive when they are waited for and not before, and shared memory is
NaN, or large codes, until something is written there.
"""

from collections import deque
from dataclasses import dataclass
from types import FunctionType, SimpleNamespace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pointers:
    data: Tensor
    at: Tensor

    @property
    def dtype(self) -> SimpleNamespace:
        return SimpleNamespace(element_ty=self.data.dtype)

    def __add__(self, offset: Tensor | int) -> "Pointers":
        return Pointers(self.data, self.at + offset)

    def read(self, mask: Tensor | None) -> Tensor:
        """0 where masked."""
        if mask is None:
            return self.data[self.at]
        at, mask = torch.broadcast_tensors(self.at, mask)
        return torch.where(mask, self.data[torch.where(mask, at, 0)], torch.zeros((), dtype=self.data.dtype))

    def write(self, value: Tensor, mask: Tensor) -> None:
        at, mask, value = torch.broadcast_tensors(self.at, mask, value)
        self.data[at[mask]] = value[mask].to(self.data.dtype)


@dataclass(frozen=True)
class Shared:
    data: Tensor

    def index(self, i: int) -> "Shared":
        return Shared(self.data[int(i)])

    def permute(self, order: tuple[int, ...]) -> "Shared":
        return Shared(self.data.permute(order))

    def load(self, layout: object) -> Tensor:
        return self.data.clone()

    def store(self, value: Tensor) -> None:
        assert value.shape == self.data.shape
        self.data.copy_(value)


class Copies:
    """Groups of copies that are on their way."""

    def __init__(self):
        self.open, self.groups = [], deque()

    def async_copy_global_to_shared(self, place: Shared, source: Pointers, mask: Tensor) -> None:
        self.open.append((place, source, mask))

    def commit_group(self) -> None:
        self.groups.append(self.open)
        self.open = []

    def wait_group(self, outstanding: int) -> None:
        while len(self.groups) > outstanding:
            for place, source, mask in self.groups.popleft():
                place.store(source.read(mask))


def _allocate(dtype: torch.dtype, shape: list[int], layout: object, value: Tensor | None = None) -> Shared:
    if value is not None:
        return Shared(value.clone())
    return Shared(torch.full(shape, float("nan") if dtype.is_floating_point else 0x7F7F, dtype=dtype))


def _layout(*arguments, **options) -> None:
    return None


_layout.get_default_for = _layout
LANGUAGE = SimpleNamespace(
    BlockedLayout=_layout, SliceLayout=_layout, NVMMADistributedLayout=_layout, NVMMASharedLayout=_layout,
    SwizzledSharedLayout=_layout, bfloat16=torch.bfloat16, float32=torch.float32, int64=torch.int64,
    allocate_shared_memory=_allocate, convert_layout=lambda x, layout: x, cdiv=lambda a, b: (a + b - 1) // b,
    arange=lambda start, stop, layout: torch.arange(start, stop), where=torch.where, exp2=torch.exp2, log2=torch.log2,
    zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
    full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
    maximum=torch.maximum, minimum=lambda a, b: torch.minimum(torch.as_tensor(a), torch.as_tensor(b)),
    max=lambda x, axis: x.amax(axis), sum=lambda x, axis: x.sum(axis),
    load=lambda at, mask=None, other=0.0: at.read(mask), store=lambda at, value, mask: at.write(value, mask),
)  # fmt: skip


class OnCPU:
    """A stand-in for `kernel`: functions of its module call each other, `replaced` what torch cannot do."""

    def __init__(self, kernel: object, replaced: dict[str, object]):
        self.copies = Copies()
        names = {
            name: getattr(thing, "value", thing)
            for name, thing in vars(__import__(kernel.__module__, fromlist="*")).items()
        }
        names |= {
            "gl": LANGUAGE, "async_copy": self.copies, "fence_async_shared": lambda: None,
            "warpgroup_mma": lambda a, b, acc, is_async: acc + a.data.float() @ b.data.float(),
            "warpgroup_mma_wait": lambda outstanding, deps: deps if len(deps) > 1 else deps[0],
        }  # fmt: skip
        for name, thing in names.items():
            if hasattr(thing, "fn") and hasattr(thing, "arg_names"):
                names[name] = FunctionType(thing.fn.__code__, names)
        names |= replaced
        self.run, self.names = names[kernel.__name__], names

    def __getitem__(self, grid: tuple[int, ...]):
        def launch(*arguments, num_warps: int, **constants) -> None:
            arguments = [Pointers(x.flatten(), torch.tensor(0)) if isinstance(x, Tensor) else x for x in arguments]
            for program in torch.cartesian_prod(*(torch.arange(n) for n in grid)).view(-1, len(grid)):
                self.names["gl"] = SimpleNamespace(**vars(LANGUAGE), program_id=lambda axis, at=program: at[axis])
                self.run(*arguments, **constants)
                assert not self.copies.groups
                assert not self.copies.open

        return launch
