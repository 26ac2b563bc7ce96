"""The residual streams of a run: where they live while a layer works on them, and their copies between units."""

import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from klquant.calibrate.activations import Activations
from klquant.calibrate.walk import Streams
from klquant.errors import UserError
from klquant.model.forward import EMBEDDING
from klquant.pipeline.journal import Journal
from klquant.pipeline.placement import Limits, place
from klquant.pipeline.units import Units
from klquant.recipe.plan import Plan

# Of activations, by kind of device.
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
WINDOWS_A_COPY = 16
# Share of a run's time that copies may take: a layer waits for the one under way. A resumed run does again what came
# after the last, which at this share is a few layers on a GPU and none on a CPU.
COPY_SHARE = 0.05


def stream_names(plan: Plan) -> list[str]:
    """The streams of a run, in the order in which they are made."""
    corrects = plan.recipe.gptq.correction and any(d.algorithm == "gptq" for d in plan.decisions)
    return ["quantized", "reference"] if corrects else ["quantized"]


class StreamStore:
    """The quantized stream, and the reference stream where target corrections need it.

    A layer changes them in place; `save` puts a copy on the disk, from which a resumed run goes on with the same bytes.
    """

    def __init__(self, units: Units, journal: Journal, ids_WS: Tensor, limits: Limits) -> None:
        """Raises UserError when a layer does not fit the memory: see `place`."""
        self.journal, self.ids = journal, ids_WS
        self.units = units
        names = stream_names(units.plan)
        width, dtype = units.reader.config.hidden_size, units.settings.dtype
        self.placement = place(units.reader.config, units.settings, *ids_WS.shape, len(names), limits)
        self.parts: dict[str, Activations] = {}
        for name in names:
            path = journal.state / f"{name}.work" if self.placement.in_files else None
            pinned = units.settings.device.type == "cuda"
            self.parts[name] = Activations(*ids_WS.shape, width, dtype, path, pinned=pinned)
        self._saved, self._took = time.monotonic(), 0.0

    @property
    def streams(self) -> Streams:
        return Streams(self.parts["quantized"], self.parts.get("reference"))

    def load(self, unit: int) -> None:
        """Fill the streams with what enters `unit`: embedded tokens for the first layer, else the saved copy."""
        for name, part in self.parts.items():
            if unit == 1:
                table = self.units.reader.weight(EMBEDDING, part.dtype)
                for start in range(0, len(part), WINDOWS_A_COPY):
                    part.write(start, F.embedding(self.ids[start : start + WINDOWS_A_COPY], table))
                continue
            file = self.journal.stream(name, unit)
            saved = Activations(*part.shape, part.dtype, file) if _whole(file, part) else None
            if saved is None:
                raise UserError(f"{file}: missing or cut short; delete {self.journal.folder} and start again")
            _copy(saved, part)
            saved.close()

    @property
    def due(self) -> bool:
        """Whether it is time for a copy, by what the last one took."""
        return COPY_SHARE * (time.monotonic() - self._saved) >= self._took

    def hold(self) -> None:
        """Let nobody change the streams before `save` has copied them, or `release` is called."""
        for part in self.parts.values():
            part.gate.close()

    @property
    def waited(self) -> float:
        """Seconds that a layer has waited for copies."""
        return sum(part.gate.waited for part in self.parts.values())

    def release(self) -> None:
        for part in self.parts.values():
            part.gate.open()

    def save(self, unit: int) -> None:
        """Put a copy of what enters `unit` on the disk, whole or not at all.

        May run beside a layer: what it has copied can be changed. The reference stream, which a layer changes first, is
        copied first, and nobody waits for the disk before both are.
        """
        began = time.monotonic()
        files = {name: self.journal.stream(name, unit) for name in reversed(self.parts)}
        halves = {name: file.with_name(f"{file.name}.half") for name, file in files.items()}
        copies = {}
        try:
            for name in files:
                halves[name].unlink(missing_ok=True)
                copies[name] = Activations(*self.parts[name].shape, self.parts[name].dtype, halves[name])
                _copy(self.parts[name], copies[name])
            for name in files:
                copies[name].sync()
                os.replace(halves[name], files[name])
        except OSError as error:
            raise UserError(
                f"{files[name]}: cannot be written: {error.strerror}; free disk space, then --resume"
            ) from None
        finally:
            for copy in copies.values():
                copy.close()
            for half in filter(Path.exists, halves.values()):
                half.unlink()
        self._saved = time.monotonic()
        self._took = self._saved - began

    def close(self) -> None:
        for part in self.parts.values():
            part.close()


def _copy(source: Activations, target: Activations) -> None:
    for start in range(0, len(source), WINDOWS_A_COPY):
        stop = min(start + WINDOWS_A_COPY, len(source))
        target.write(start, source.read(start, stop))
        source.gate.passed(stop)


def _whole(file, part: Activations) -> bool:
    return file.exists() and file.stat().st_size == part.nbytes
