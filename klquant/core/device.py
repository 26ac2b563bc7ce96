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
        return f"cpu {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    return "cuda " + ", ".join(sorted({torch.cuda.get_device_name(device) for device in devices}))


def pick_devices(names: str) -> list[torch.device]:
    """One device or several of a kind, `cuda:0,cuda:1`. Raises UserError when one is not there or a card
    comes twice."""
    devices = [pick_device(name.strip()) for name in names.split(",")]
    if len({device.type for device in devices}) > 1:
        raise UserError(f"devices {names}: of several kinds; a result depends on the kind of device")
    cards = [device.index or 0 for device in devices if device.type == "cuda"]
    if len(set(cards)) < len(cards):
        raise UserError(f"devices {names}: a card comes twice")
    return devices
