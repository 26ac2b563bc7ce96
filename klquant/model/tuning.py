"""flash-linear-attention tunes its kernels when a machine first runs them: minutes in which nothing seems to happen."""

import importlib.util
from pathlib import Path

import torch

from klquant.model.delta import delta_path

NOTE = (
    "the first prompt on this machine takes one to three minutes more: flash-linear-attention tunes its kernels for "
    "the card, once"
)


def tuning_note(device: torch.device, dtype: torch.dtype) -> str | None:
    """What to tell someone who is about to wait for that.

    None: no prompt of `dtype` takes those kernels on `device`, or Triton's cache has what an earlier run found.
    """
    if delta_path(device, dtype, 2) != "chunk_fla" or importlib.util.find_spec("triton") is None:
        return None
    from triton import knobs

    return None if any(Path(knobs.cache.dir).glob("*/chunk_kda_*.autotune.json")) else NOTE
