"""The disk that a run takes: its result, and what lies beside that until it is done."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from klquant.calibrate.coverage import whole_windows
from klquant.checkpoint.writer import side_files
from klquant.core.units import decimal
from klquant.errors import UserError
from klquant.pipeline.run import RunOptions, place_streams, walk_settings
from klquant.recipe.plan import Plan

# A stored tensor's share of headers, index, klquant.json and the records of units: no more than this.
BYTES_A_TENSOR = 1000
# Of the streams: the next copy is written while the last one is there. Where memory is short, they live there as well.
COPIES = {False: 2, True: 3}
TOKEN_BYTES = 8


@dataclass(frozen=True)
class Room:
    """Bytes on the disk: `result` stays; `working` (calibration text, saved activations) goes when the run is done."""

    result: int
    working: int

    @classmethod
    def of(cls, plan: Plan, model: Path, options: RunOptions) -> "Room":
        """Of the run that `plan` describes; the folder `model` has the side files that are copied. Text that is drawn
        for rare experts on top is not foreseen. Raises UserError where memory has no room for the run."""
        sides = sum(file.stat().st_size for file in side_files(model))
        result = plan.part().bytes_after + BYTES_A_TENSOR * len(plan.stored_sizes()) + sides
        if not plan.needs_calibration:
            return cls(result, 0)
        params, placed = plan.recipe.calibration, place_streams(plan, walk_settings(plan, options), options.limits)
        tokens = whole_windows(params)[0] * params.window
        return cls(result, TOKEN_BYTES * tokens + COPIES[placed.in_files] * placed.streams)

    def to_go_on(self) -> "Room":
        """Of a run that was begun: its text is there, and copies of streams take the place of others."""
        return Room(self.result, 0)


def require_room(rooms: Sequence[Room], out: Path, unfinished: Sequence[Path], what: str, instead: str) -> None:
    """Raises UserError where the disk of `out` cannot hold the results of runs, one after another, and the working
    files of one. What the folders `unfinished` hold counts as room. `what` takes it; `instead`: what would mend it."""
    result, working = sum(room.result for room in rooms), max((room.working for room in rooms), default=0)
    home = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    written = sum(file.stat().st_size for folder in unfinished for file in folder.rglob("*") if file.is_file())
    have = shutil.disk_usage(home).free + written
    if have < result + working:
        beside = f" and {decimal(working)} for text and activations until all is done" if working else ""
        raise UserError(
            f"{home}: {what} {decimal(result)}{beside}, but only {decimal(have)} are free; free disk space or {instead}"
        )
