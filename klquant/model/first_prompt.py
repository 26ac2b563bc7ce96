"""Before a first prompt: seconds of importing fla in a process, half a minute of building kernels on a machine."""

import importlib
from contextlib import suppress
from pathlib import Path
from threading import Thread

import torch

from klquant.core.packages import is_installed
from klquant.model.delta import delta_path

NOTE = "the first prompt on this machine takes up to half a minute more: kernels are built for the card, once"


def building_note(device: torch.device, dtype: torch.dtype) -> str | None:
    """What to tell someone who is about to wait for that.

    None: no prompt of `dtype` takes those kernels on `device`, or Triton's cache has what an earlier run built.
    """
    if delta_path(device, dtype, 2) != "chunk_fla" or not is_installed("triton"):
        return None
    from triton import knobs

    return None if any(Path(knobs.cache.dir).glob("*/chunk_kda_fwd_*.cubin")) else NOTE


def import_fla(device: torch.device, dtype: torch.dtype) -> None:
    """Begin to import it if prompts of `dtype` will take its kernels, while weights are read.

    It brings torch's compiler along, which is what takes the time.
    """
    if delta_path(device, dtype, 2) == "chunk_fla":
        Thread(target=_import, name="import fla", daemon=True).start()


def _import() -> None:
    # Whoever needs it hears of what is wrong with it.
    with suppress(Exception):
        importlib.import_module("fla.ops.kda")
