"""Devices by name."""

from collections.abc import Sequence

import torch

from klquant.errors import UserError


def default_device() -> str:
    """The GPU where there is one: nobody wants a 48B model evaluated on a CPU because an option was forgotten."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def pick_device(name: str | None) -> torch.device:
    """`cpu`, `cuda` or `cuda:N`; None is `default_device()`. Raises UserError when there is no such device."""
    name = default_device() if name is None else name
    if name == "cpu":
        return torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"unknown device {name!r}; use cpu, cuda or cuda:N") from None
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise UserError(f"device {name}: {count} CUDA device(s) found here; use cpu, or check the driver")
    else:
        raise UserError(f"unknown device {name!r}; use cpu, cuda or cuda:N")
    return device


def hardware(devices: Sequence[torch.device]) -> str:
    """Kind of the devices, and what decides the order of sums there: a CPU's instructions and torch's threads, a card's
    model."""
    if devices[0].type == "cpu":
        threads = torch.get_num_threads()
        return f"cpu {torch.backends.cpu.get_cpu_capability()}, {threads} thread{'s' * (threads != 1)}"
    return "cuda " + ", ".join(sorted({torch.cuda.get_device_name(device) for device in devices}))


def pick_devices(names: str) -> list[torch.device]:
    """One device or several of a kind, each once: `cuda:0,cuda:1`. Raises UserError when one is not there, comes
    twice, or is of another kind than the rest."""
    devices = [pick_device(name.strip()) for name in names.split(",")]
    if len(set(map(numbered, devices))) < len(devices):
        raise UserError(f"devices {names}: one comes twice; name each once")
    if len({device.type for device in devices}) > 1:
        raise UserError(f"devices {names}: of several kinds; name CUDA devices, or the CPU alone")
    return devices


def numbered(device: torch.device) -> torch.device:
    """`cuda` is the first card."""
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device
