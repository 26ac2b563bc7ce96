"""Devices by name."""

import torch

from klquant.errors import UserError


def pick_device(name: str) -> torch.device:
    """`cpu`, `cuda` or `cuda:N`. Raises UserError when there is no such device."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"unknown device {name!r}; use cpu, cuda or cuda:N") from None
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise UserError(f"device {name}: {count} CUDA device(s) found here; use cpu, or check the driver")
    elif device.type != "cpu":
        raise UserError(f"unknown device {name!r}; use cpu, cuda or cuda:N")
    return device
