"""The tasks of one evaluation: opened before any model is run, finished ones kept, both models asked the same."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from pydantic import TypeAdapter, ValidationError

from klquant.calibrate.tokenizer import Tokenizer
from klquant.checkpoint.writer import write_json
from klquant.errors import UserError
from klquant.evaluate.options import TaskOptions, Watcher
from klquant.evaluate.tasks.harness import Harness
from klquant.evaluate.tasks.model import TaskModel, require_resident
from klquant.evaluate.tasks.needle import ALL, KINDS, NeedleTask
from klquant.evaluate.tasks.record import TaskResult, TaskScore
from klquant.evaluate.tasks.scores import compare
from klquant.evaluate.tasks.text import TaskText
from klquant.evaluate.trace import Runner

SCHEMA = 1  # of the files of finished tasks
_RESULTS = TypeAdapter(list[TaskResult])


class OneTask(Protocol):
    """`writes`: whether models answer it by writing text."""

    name: str
    version: str
    writes: bool

    def ask(self, text: TaskText) -> str: ...

    def run(self, model: TaskModel, text: TaskText, watcher: Watcher, stage: str, sha256: str) -> list[TaskResult]: ...


@dataclass(frozen=True)
class Side:
    """A model that answers. `purpose`: what its answers depend on beside the questions. `folder`: where finished tasks
    are kept."""

    whose: Literal["model", "reference"]
    name: str
    load: Callable[[], Runner]
    purpose: Mapping[str, object]
    folder: Path


class Suite:
    """Tasks with the hash of all that they ask. Raises UserError for an unknown task, missing data, or what the model
    cannot do, before anything is computed."""

    def __init__(self, options: TaskOptions, tokenizer: Tokenizer, folder: Path, room: int, watcher: Watcher) -> None:
        """`folder`: the checkpoint that the tokenizer is from. `room`: the model's context."""
        self.watcher, self.text = watcher, TaskText(tokenizer, folder, room, options.chat)
        self.tasks: list[tuple[OneTask, str]] = []
        names, harness = _open(options)
        for name in dict.fromkeys(names):
            watcher.begin(f"questions of {name}", 1)
            task = NeedleTask(name, options, room) if name in KINDS else harness.load(name)
            self.tasks.append((task, task.ask(self.text)))
            watcher.advance(1)

    def require(self, runner: Runner) -> None:
        """Raises UserError where a task asks for text and the model would not stay on the device."""
        for task, _ in self.tasks:
            if task.writes:
                require_resident(runner, task.name)

    def score(self, ours: Side, theirs: Side | None = None) -> list[TaskScore]:
        """Every metric of every task, the reference's beside the model's where there is one."""
        reference = None if theirs is None else self._run(theirs)
        model = self._run(ours)
        return [compare(r, None if reference is None else reference[i]) for i, r in enumerate(model)]

    def _run(self, side: Side) -> list[TaskResult]:
        """Finished tasks are taken from the side's folder."""
        model, results = None, []
        side.folder.mkdir(parents=True, exist_ok=True)
        for task, sha256 in self.tasks:
            key = {"schema": SCHEMA, "task": task.name, "version": task.version, "asked": sha256, **side.purpose}
            file = side.folder / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]}.json"
            if (found := _read(file)) is None:
                model = model or TaskModel(side.load(), side.name)
                found = task.run(model, self.text, self.watcher, f"{task.name}, {side.whose}", sha256)
                write_json(file, [r.model_dump(mode="json") for r in found])
            results += found
        return results


def require_names(options: TaskOptions) -> None:
    """Raises UserError for an unknown task, and where lm-eval is asked for and not installed."""
    _open(options)


def _open(options: TaskOptions) -> tuple[list[str], Harness | None]:
    """The tasks that `options` name, and lm-eval where some are its own."""
    names = [n for name in dict.fromkeys(options.names) for n in (KINDS if name == ALL else [name])]
    foreign = [n for n in names if n not in KINDS]
    return names, Harness(foreign, [ALL, *KINDS], options) if foreign else None


def notes(scores: Sequence[TaskScore]) -> list[str]:
    return [
        f"task {task}: {cut} questions were longer than the model's context and lost their beginning"
        for task, cut in {t.task: t.cut for t in scores}.items() if cut
    ]  # fmt: skip


def _read(file: Path) -> list[TaskResult] | None:
    if not file.exists():
        return None
    try:
        return _RESULTS.validate_json(file.read_bytes())
    except ValidationError:
        raise UserError(f"{file}: damaged; delete it and run the same command again") from None
