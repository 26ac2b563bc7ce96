"""How much memory there is, and host memory that a GPU copies at full speed."""

import os

import torch
from torch import Tensor


def free_memory(device: torch.device | None = None) -> int:
    """Bytes that can be used now: of a CUDA device, or of the host without swapping."""
    if device is not None and device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        taken = torch.cuda.memory_allocated(device)
        # What the allocator holds unused is free to this process; what it may not exceed is not.
        free += torch.cuda.memory_reserved(device) - taken
        return min(free, int(torch.cuda.get_per_process_memory_fraction(device) * total) - taken)
    try:
        with open("/proc/meminfo") as file:
            rows = dict(line.split(":") for line in file)
        return int(rows["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def total_memory(device: torch.device) -> int:
    """Bytes of a CUDA device's memory."""
    return torch.cuda.mem_get_info(device)[1]


def pin(tensor: Tensor) -> bool:
    """Lock a CPU tensor's memory for a GPU's copies, until `unpin`; whether the system let it.

    `torch.empty(pin_memory=True)` would round large sizes up to a power of two.
    """
    return int(torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)) == 0


def unpin(tensor: Tensor) -> None:
    """Undo `pin`, before the memory is given back."""
    torch.cuda.cudart().cudaHostUnregister(tensor.data_ptr())
