"""An unfinished output folder: what is done, what it was made for, and how it becomes the finished one.

While a run is under way everything lies in `OUT.unfinished`: finished shards under their final names, one
`unit-NNN.json` for each finished unit (written last: it is the commit) and the residual streams that enter one of the
last units, where a resumed run begins. Nothing there looks like a checkpoint: config.json and the index come when
all units are done, and one rename makes the folder OUT.
"""

import fcntl
import json
import os
import shutil
from collections import Counter
from dataclasses import asdict, dataclass, fields
from itertools import count
from pathlib import Path

from klquant.checkpoint.index import CONFIG, PROVENANCE
from klquant.checkpoint.writer import write_json
from klquant.errors import UserError

SUFFIX = ".unfinished"
STATE = ".state"
TRASH = ".trash"
PURPOSE = "purpose.json"
OTHER_TEXT = "other calibration text"


@dataclass(frozen=True)
class Purpose:
    """What a run's bytes depend on. Two runs of equal purpose write the same output."""

    klquant: str
    torch: str
    weights: str
    plan: str
    calibration: str | None
    device: str
    shard_bytes: int


SETTINGS = "settings"  # in PURPOSE, beside the purpose: what its `plan` is a digest of
OTHER_FORMAT = "another version of klquant"
# Field → what to say when a resumed run was started with another value.
_CHANGED = {
    "klquant": "klquant {0}, not {1}",
    "torch": "torch {0}, not {1}",
    "weights": "other weights",
    "plan": "another recipe, target or tensor index",
    "calibration": OTHER_TEXT,
    "device": "the device {0!r}, not {1!r}",
    "shard_bytes": "shards of {0:,} bytes, not {1:,}",
}


class Journal:
    """The unfinished folder of one run. Hold it open (`with`) while working: no second run may work there."""

    def __init__(self, out: Path) -> None:
        if out.name in ("", ".."):
            raise UserError(f"{out}: is no name for a new folder; choose another output")
        self.out = out
        self.folder = out.with_name(out.name + SUFFIX)
        self.state = self.folder / STATE
        self.found: dict | None = None
        self.settings: dict = {}
        self._lock = -1

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def find(self, resume: bool) -> dict | None:
        """The purpose of the unfinished run to go on with, as a dict; None when a new one is to be begun.

        Raises UserError when OUT is not empty, when an unfinished run is in the way and `resume` is not set, and when
        another process works on it.
        """
        check_output(self.out)
        if not self.folder.exists():
            return None
        if not resume:
            raise self._in_the_way()
        self._take()
        if self.complete:
            self.settings = self._read(self.folder / PROVENANCE)
            self.found = self.settings.get("purpose", {})
        elif (self.state / PURPOSE).exists():  # else it was killed while the folder was being made
            self.found = self._read(self.state / PURPOSE)
            self.settings = self.found.pop(SETTINGS, {})
        if self.found is not None and self.found.keys() != {field.name for field in fields(Purpose)}:
            raise self.refusal(OTHER_FORMAT)
        return self.found

    def make(self) -> None:
        """Make the folder of a new run; `begin` makes it one that can be gone on with.

        Raises UserError, as `find` does, when another run has been there since.
        """
        check_output(self.out)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._take()
            if self.complete or (self.state / PURPOSE).exists():
                raise self._in_the_way()
            self.state.mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be created: {error.strerror}") from None

    def begin(self, purpose: Purpose, settings: dict) -> None:
        """Commit to a purpose, and keep the `settings` that its plan came of: `recipe` and `target`. What a resumed run
        needs beside finished units must be in the folder already."""
        write_json(self.state / PURPOSE, asdict(purpose) | {SETTINGS: settings})
        self.found = asdict(purpose)

    def check(self, purpose: Purpose, settings: dict) -> None:
        """Raises UserError unless the run found is one for `purpose`; `settings` name what differs of the plan. Where
        nothing is left to compute, any device will do."""
        now, changed = asdict(purpose), []
        for key, text in _CHANGED.items():
            if self.found.get(key) != now[key] and not (key == "device" and self.complete):
                named = _changed_settings(self.settings, settings) if key == "plan" else []
                changed += named or [text.format(self.found.get(key), now[key])]
        if changed:
            raise self.refusal("; ".join(changed))

    def _in_the_way(self) -> UserError:
        return UserError(
            f"{self.folder}: an unfinished run is there; continue it with --resume, or delete it to start again"
        )

    def refusal(self, what: str) -> UserError:
        return UserError(f"{self.folder}: was started with {what}; resume it as it was started, or delete it")

    @property
    def done(self) -> int:
        """How many units are finished."""
        return next(unit for unit in count() if not self._unit(unit).exists())

    @property
    def complete(self) -> bool:
        """Whether all files are final and only the last rename is missing: config.json is written when they are."""
        return (self.folder / CONFIG).exists() and not self.state.exists()

    def _take(self) -> None:
        if self._lock < 0:
            self._lock = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{self.folder}: another run is at work there; let it finish, or stop it first") from None

    def commit(self, unit: int, record: dict) -> None:
        """Mark a unit as done. Its shards and the streams that leave it must be on the disk already."""
        write_json(self._unit(unit), record)

    def record(self, unit: int) -> dict:
        return self._read(self._unit(unit))

    def require_shards(self, units: int) -> None:
        """Raises UserError unless the shards of the first `units` units are there and as long as they were written."""
        for unit in range(units):
            self._require_files(self.record(unit)["shards"])

    def _require_files(self, shards: dict[str, dict]) -> None:
        for name, record in shards.items():
            file, nbytes = self.folder / name, record["bytes"]
            found = file.stat().st_size if file.exists() else None
            if found != nbytes:
                what = "is missing" if found is None else f"has {found:,} bytes and was written with {nbytes:,}"
                raise UserError(f"{file}: {what}; put it back, or delete {self.folder} and start again")

    def stream(self, name: str, unit: int) -> Path:
        """File of the stream `name` as it enters `unit`."""
        return self.state / f"{name}-{unit:03d}.bin"

    def start(self, names: list[str]) -> int:
        """The unit that a run goes on with, given the names of its streams: the first that is not done, if no streams
        are needed or those that enter it are there; else the last before it whose streams are, or that needs none."""
        done, files = self.done, [path.stem.rpartition("-") for path in self.state.glob("*.bin")]
        saved = Counter(int(unit) for name, _, unit in files if name in names and int(unit) <= done)
        # The first layer's streams are made from the text.
        return max(
            [unit for unit, found in saved.items() if found == len(names)], default=min(done, 1 if names else done)
        )

    def drop_streams(self, unit: int) -> None:
        """Delete the streams that entered units before `unit`: no resume needs them any more."""
        for path in self.state.glob("*.bin"):
            if int(path.stem.rpartition("-")[2]) < unit:
                path.unlink()

    def finish(self) -> dict:
        """Turn the folder into OUT and return its provenance.

        The state goes in one step, so that what is left is never half a state.
        """
        trash, provenance = self.folder / TRASH, self._read(self.folder / PROVENANCE)
        self._require_files(provenance["shards"])
        try:
            if self.state.exists():
                os.replace(self.state, trash)
            shutil.rmtree(trash, ignore_errors=True)
            if self.out.exists():
                self.out.rmdir()  # empty: checked on opening
            os.replace(self.folder, self.out)
        except OSError as error:
            raise UserError(
                f"{self.out}: cannot take the finished {self.folder.name} ({error.strerror}); mend that, then --resume"
            ) from None
        return provenance

    def _unit(self, unit: int) -> Path:
        return self.state / f"unit-{unit:03d}.json"

    def _read(self, file: Path) -> dict:
        try:
            value = json.loads(file.read_text())
        except (OSError, ValueError):
            value = None
        if not isinstance(value, dict):
            raise UserError(f"{file}: unreadable; delete {self.folder} and start again")
        return value


def _changed_settings(then: dict, now: dict) -> list[str]:
    """What a run was started with and is not now, of `recipe` and `target`: by key, with both values."""
    old, new = then.get("recipe", {}), now["recipe"]
    said = [f"{key} {a}, not {b}" for key, a, b in (
        ("recipe", old.get("name"), new["name"]), ("target", then.get("target"), now["target"])) if a != b]  # fmt: skip
    if not old or old.get("name") != new["name"]:
        return said if old else []
    for key, value in new.items():
        if isinstance(value, dict):
            was = old.get(key, {})
            said += [f"{key}.{part} {was.get(part)}, not {v}" for part, v in value.items() if was.get(part) != v]
        elif old.get(key) != value:
            said.append(f"other {key} of the recipe")
    return said


def check_output(out: Path) -> None:
    """Raises UserError unless OUT can be made: it does not exist, or is an empty folder."""
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise UserError(f"{out}: exists and is not an empty folder; choose another output or empty it first")
    check_home(out)


def check_home(out: Path) -> None:
    """Raises UserError unless OUT, which is not there yet, can be created where it belongs."""
    home = next(parent for parent in out.absolute().parents if parent.exists())
    if not home.is_dir():
        raise UserError(f"{out}: cannot be created: {home} is a file; choose another output")
    if not os.access(home, os.W_OK | os.X_OK):
        raise UserError(f"{out}: cannot be created: {home} is not writable; choose another output")
