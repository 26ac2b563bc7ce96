"""A folder with one file a window: how an evaluation is resumed, and how variants share one reference pass.

Beside the windows lies `purpose.json`: what their content depends on. Several processes may work in one folder: each
writes under names of its own, and what takes its place under the common name is equal.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from klquant.checkpoint.writer import write_json, write_safetensors
from klquant.errors import UserError

PURPOSE = "purpose.json"
# Seconds after which what a process has not finished to write is of one that was killed.
ABANDONED = 24 * 3600


@dataclass(frozen=True)
class WindowFolder:
    """Finished windows of one purpose; a window's file is whole or not there."""

    folder: Path

    @classmethod
    def open(cls, folder: Path, purpose: Mapping[str, object]) -> "WindowFolder":
        """Make the folder, or find it again. Windows that were made for another purpose are deleted.

        Raises UserError when the folder holds anything else.
        """
        file = folder / PURPOSE
        try:
            if folder.exists() and (before := _read(file)) != purpose:
                if before is not None:
                    shutil.rmtree(folder)
                elif any(not path.name.startswith(".") for path in folder.iterdir()):
                    raise UserError(f"{folder}: holds something else than windows of klquant eval; move or delete it")
            folder.mkdir(parents=True, exist_ok=True)
            for half in folder.glob(".*"):
                # Its owner may put it in place meanwhile.
                with suppress(FileNotFoundError):
                    if time.time() - half.stat().st_mtime > ABANDONED:
                        half.unlink()
        except OSError as error:
            raise UserError(f"{folder}: cannot be created: {error.strerror}") from None
        if not file.exists():
            _alone(file, lambda own: write_json(own, dict(purpose)))
        return cls(folder)

    def __contains__(self, window: int) -> bool:
        return self._file(window).exists()

    def write(self, window: int, tensors: Mapping[str, Tensor]) -> None:
        _alone(self._file(window), lambda own: write_safetensors(own, tensors, {}))

    def read(self, window: int) -> "WindowFile":
        return WindowFile(self._file(window))

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, window: int) -> Path:
        return self.folder / f"window-{window:05d}.safetensors"


class WindowFile:
    """The tensors of one window, read when asked for, whole or by leading rows.

    Raises UserError naming the file when it is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = safe_open(path, "pt")
        except (SafetensorError, OSError) as error:
            raise self._damaged(error) from None

    def __getitem__(self, name: str) -> Tensor:
        try:
            return self._file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise self._damaged(error) from None

    def rows(self, names: list[str], start: int, stop: int) -> dict[str, Tensor]:
        try:
            return {name: self._file.get_slice(name)[start:stop] for name in names}
        except (SafetensorError, OSError) as error:
            raise self._damaged(error) from None

    def names(self) -> list[str]:
        return list(self._file.keys())

    def tensors(self) -> dict[str, Tensor]:
        return {name: self[name] for name in self.names()}

    def _damaged(self, error: Exception) -> UserError:
        return UserError(f"{self.path}: damaged ({error}); delete it and run the same command again")


def _alone(file: Path, write: Callable[[Path], object]) -> None:
    """Write under a name that no other process uses, then put it in place."""
    own = file.with_name(f".{os.getpid()}-{file.name}")
    try:
        write(own)
        os.replace(own, file)
    except (OSError, UserError):
        if not file.parent.exists():
            raise UserError(f"{file.parent}: was taken away by another evaluation with the same output; choose another "
                            "output for one of them") from None  # fmt: skip
        raise


def _read(file: Path) -> object:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return None
