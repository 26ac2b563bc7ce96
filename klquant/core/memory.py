"""How much memory there is, and host memory that a GPU copies at full speed."""

import mmap
import os
import resource
from contextlib import suppress

import torch
from torch import Tensor

from klquant.errors import UserError

# cudaHostRegisterPortable: every card copies the memory at full speed, not only the one that is current.
PORTABLE = 1
# Memory on a card that torch's allocator does not count: CUDA context and kernels.
CUDA_CONTEXT = 600 << 20

# Where a tensor of any dtype may begin in a buffer of bytes.
ALIGNMENT = 64


def free_memory(device: torch.device | None = None) -> int:
    """Bytes that can be used now: of a CUDA device, or of the host without swapping."""
    if device is not None and device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        taken = torch.cuda.memory_allocated(device)
        # What the allocator holds unused is free to this process; what it may not exceed is not.
        free += torch.cuda.memory_reserved(device) - taken
        # By index: torch takes no `cuda` without a number here, but None for the current one.
        return min(free, int(torch.cuda.get_per_process_memory_fraction(device.index) * total) - taken)
    try:
        with open("/proc/meminfo") as file:
            rows = dict(line.split(":") for line in file)
        return int(rows["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def resident_memory() -> int:
    """Bytes of the host's memory that this process takes now; at most so far where the system does not tell."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def total_memory(device: torch.device) -> int:
    """Bytes of a CUDA device's memory."""
    return torch.cuda.mem_get_info(device)[1]


def limit_memory(device: torch.device, nbytes: int) -> None:
    """Let torch take at most `nbytes` of a CUDA device, what CUDA itself takes (`CUDA_CONTEXT`) not counted."""
    # By index: torch takes no `cuda` without a number here, but None for the current one.
    torch.cuda.set_per_process_memory_fraction(min(1.0, nbytes / total_memory(device)), device.index)


def own_pages(nbytes: int) -> Tensor:
    """Uninitialized bytes [nbytes], uint8, on pages of memory that nothing else lies on.

    CUDA locks whole pages, and refuses to copy what lies on locked and other ones: what the heap puts behind a locked
    tensor does. `torch.empty(pin_memory=True)` would round large sizes up to a power of two.
    """
    pages = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=torch.uint8)[:nbytes]


class _Locked(mmap.mmap):
    """Pages that cards know of, until the last tensor on them is gone."""

    address = 0

    def __del__(self) -> None:
        if self.address:
            # At the process's end CUDA may be gone before them.
            with suppress(Exception):
                torch.cuda.cudart().cudaHostUnregister(self.address)


def locked_pages(nbytes: int) -> Tensor:
    """Uninitialized bytes [nbytes], uint8, that kernels of every card can read and write where they are.

    Raises UserError when the system does not let so much be locked.
    """
    pages = _Locked(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    tensor = torch.frombuffer(pages, dtype=torch.uint8)[:nbytes]
    if nbytes and not _register(tensor.data_ptr(), nbytes):
        raise UserError(
            f"the system does not let {nbytes / (1 << 20):,.0f} MiB of the host's memory be locked for the GPU, beside "
            "what is locked already; raise the limit (ulimit -l), or free memory"
        )
    pages.address = tensor.data_ptr()
    return tensor


def aligned(nbytes: int) -> int:
    """Bytes that a tensor takes in a buffer where another one follows."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def pin(tensor: Tensor) -> bool:
    """Lock a tensor from `own_pages` for a GPU's copies, until `unpin`; whether the system let it."""
    return _register(tensor.data_ptr(), tensor.nbytes)


def _register(address: int, nbytes: int) -> bool:
    done = int(torch.cuda.cudart().cudaHostRegister(address, nbytes, PORTABLE)) == 0
    if not done:
        # CUDA keeps the refusal, and the next launch would report it as its own: let one that does not matter do so.
        with suppress(RuntimeError):
            torch.ones(1, device="cuda")
    return done


def unpin(tensor: Tensor) -> None:
    """Undo `pin`, before the memory is given back."""
    torch.cuda.cudart().cudaHostUnregister(tensor.data_ptr())
