"""Passes of checkpoints over one text: the reference's, kept for others, and those that are compared with it."""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from klquant.evaluate.options import DtypeName, StoreKind, Watcher
from klquant.evaluate.result import Arithmetic, Floor, Reference
from klquant.evaluate.score import model_window, reference_window
from klquant.evaluate.source import Source
from klquant.evaluate.statistics import by_layer, by_position, quality
from klquant.evaluate.store import SAMPLES, TOP
from klquant.evaluate.text import EvalText
from klquant.evaluate.trace import Runner, Trace
from klquant.evaluate.windows import WindowFolder
from klquant.model.delta import delta_path

DTYPES: dict[DtypeName, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
OTHER: dict[DtypeName, DtypeName] = {"float32": "bfloat16", "bfloat16": "float32"}
SCHEMA = 2  # of the window files; with another one they are made again


@dataclass(frozen=True)
class Scored:
    """A finished pass: its windows' records, and what of it was computed now."""

    records: list[dict[str, Tensor]]
    seconds: float
    tokens: int


@dataclass(frozen=True)
class Passes:
    """`dtype` is the reference's and the model's arithmetic, `store` how the reference's distributions are kept."""

    text: EvalText
    device: torch.device
    dtype: DtypeName
    store: StoreKind
    watcher: Watcher

    def arithmetic(self, dtype: DtypeName) -> Arithmetic:
        path = delta_path(self.device, DTYPES[dtype], self.text.ids_WS.shape[1])
        return Arithmetic(dtype=dtype, device=self.device.type, kda=path)

    def purpose(self, fingerprint: str, dtype: DtypeName) -> dict[str, object]:
        """What the windows of a pass depend on."""
        arithmetic = self.arithmetic(dtype).model_dump()
        return {"schema": SCHEMA, "weights": fingerprint, "windows": self.text.sha256, "arithmetic": arithmetic}

    def reference(self, source: Source, reference: Reference, caches: Path) -> WindowFolder:
        """The reference's windows in a folder of `caches` named by their purpose, computed where they lack."""
        purpose = self.purpose(reference.checkpoint.fingerprint, self.dtype)
        purpose |= {"store": self.store, "top": TOP, "samples": SAMPLES}
        key = hashlib.sha256(json.dumps(purpose, sort_keys=True).encode()).hexdigest()[:16]
        cache = WindowFolder.open(caches / key, purpose)

        def make(runner: Runner, trace: Trace, i: int) -> dict[str, Tensor]:
            return reference_window(runner, trace, i, self.text.ids_WS[trace.windows[i]], self.store)

        self._pass(source, self.dtype, cache, make, "reference")
        return cache

    def floor(self, source: Source, reference: Reference, cache: WindowFolder) -> Floor:
        """The reference's weights in the other precision, against the reference; kept in its cache."""
        dtype = OTHER[self.dtype]
        purpose = self.purpose(reference.checkpoint.fingerprint, dtype)
        folder = WindowFolder.open(self._floor_folder(cache), purpose)
        scored = self.compare(source, dtype, cache, folder, f"floor, {dtype}")
        what = f"the reference's weights computed in {dtype} instead of {self.dtype}"
        return Floor(what=what, arithmetic=self.arithmetic(dtype), **self.figures(scored, source))

    def known_floor(self, source: Source, reference: Reference, cache: WindowFolder) -> Floor | None:
        """The floor where an evaluation has measured it before, None where that would take a pass."""
        folder = WindowFolder(self._floor_folder(cache))
        known = all(window in folder for window in range(len(self.text.ids_WS)))
        return self.floor(source, reference, cache) if known else None

    def compare(
        self, source: Source, dtype: DtypeName, cache: WindowFolder | None, folder: WindowFolder, stage: str
    ) -> Scored:
        """Score the windows that `folder` lacks, against the cache if there is one; returns all of them."""

        def make(runner: Runner, trace: Trace, i: int) -> dict[str, Tensor]:
            window = trace.windows[i]
            reference = None if cache is None else cache.read(window)
            return model_window(runner, trace, i, self.text.ids_WS[window], self.store, reference)

        started = time.monotonic()
        windows = self._pass(source, dtype, folder, make, stage)
        seconds = time.monotonic() - started
        records = [folder.read(w).tensors() for w in range(len(self.text.ids_WS))]
        return Scored(records, seconds, windows * self.text.ids_WS.shape[1])

    def figures(self, scored: Scored, source: Source) -> dict:
        """overall, domains, positions and layers of a result."""
        config, records = source.config, scored.records
        groups = {name: [records[w] for w in rows] for name, rows in self.text.windows_of().items()}
        overall = quality(groups)
        kinds = [(config.is_mla(layer), config.is_moe(layer)) for layer in range(config.num_layers)]
        return {
            "overall": overall,
            "domains": {name: quality({name: group}) for name, group in groups.items()},
            "positions": [] if overall.kld is None else by_position(records),
            "layers": by_layer(records, kinds),
        }

    def _floor_folder(self, cache: WindowFolder) -> Path:
        return cache.folder / f"floor-{OTHER[self.dtype]}"

    def _pass(
        self, source: Source, dtype: DtypeName, folder: WindowFolder,
        make: Callable[[Runner, Trace, int], dict[str, Tensor]], stage: str,
    ) -> int:  # fmt: skip
        """Write the windows that `folder` lacks; returns how many there were."""
        ids_WS = self.text.ids_WS
        missing = [w for w in range(len(ids_WS)) if w not in folder]
        if not missing:
            return 0
        runner = Runner(source, DTYPES[dtype], self.device)
        batches = [b for b in runner.batches(ids_WS) if any(w in missing for w in b)]
        steps = source.config.num_layers + 1  # the head counts as a layer
        self.watcher.begin(stage, steps * sum(map(len, batches)) * ids_WS.shape[1])
        for trace in runner.run(ids_WS, batches, self.watcher.advance):
            for i, window in enumerate(trace.windows):
                if window in missing:
                    folder.write(window, make(runner, trace, i))
                self.watcher.advance(ids_WS.shape[1])
        return len(missing)
