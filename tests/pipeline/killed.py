"""Runs that are killed: `python -m tests.pipeline.killed FOLDER CASES` with CASES a JSON object name → list of kills.

Makes FOLDER/model and quantizes it undisturbed to FOLDER/whole. Then for each case one process after the other works on
FOLDER/<name>: the i-th is killed (SIGKILL) as kill i says, and one more runs to the end. Prints, as JSON, name → how
each process ended (−9 for killed). Processes are forked from one in which everything is imported and warm.

Kills: ["phase", unit, phase]: when it begins; ["done", unit]; ["before" | "after", n]: the n-th rename of a file or
folder; ["block", n]: the n-th tensor written into a shard; ["stream", n]: the n-th stream written whole, but
not yet under its name; ["remove", n]: the n-th file removed.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch

from klquant.calibrate.activations import Activations
from klquant.checkpoint import writer
from klquant.pipeline import streams
from klquant.pipeline.report import Silent
from tests.pipeline.build import run, short_model


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Killer(Silent):
    def __init__(self, kill: list) -> None:
        self.kill = kill

    def phase(self, unit: str, phase: str, fraction: float) -> None:
        if self.kill[0] == "phase" and self.kill[1] == unit and phase.startswith(self.kill[2]):
            die()

    def done(self, unit) -> None:
        if self.kill == ["done", unit.name]:
            die()


def on_call(owner: object, name: str, n: int, after: bool = False) -> None:
    """Die before (or after) the n-th call of `owner.name`."""
    real, calls = getattr(owner, name), 0

    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == n and not after:
            die()
        result = real(*args, **kwargs)
        if calls == n:
            die()
        return result

    setattr(owner, name, counted)


def arm(kill: list) -> None:
    match kill:
        case ["before" | "after" as when, n]:
            on_call(os, "replace", n, after=when == "after")
        case ["block", n]:
            on_call(writer, "_view", n)
        case ["stream", n]:
            on_call(Activations, "sync", n)
        case ["remove", n]:
            on_call(os, "unlink", n, after=True)


def attempt(model: Path, out: Path, kill: list) -> int:
    """Run (or go on) in a process of its own; how it ended."""
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)  # threads that mend torch's pool after a fork at the same time would trip over it
        arm(kill)
        code = 1
        try:
            run(model, out, watcher=Killer(kill), resume=True)
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main(folder: Path, cases: dict[str, list[list]]) -> dict[str, list[int]]:
    torch.set_num_threads(1)
    os.fsync = lambda handle: None  # a killed process leaves the page cache as it is
    streams.COPY_SHARE = 1e9  # a copy after every layer
    model = short_model(folder / "model")
    run(model, folder / "whole")
    return {
        name: [attempt(model, folder / name, kill) for kill in [*kills, ["never"]]] for name, kills in cases.items()
    }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), json.loads(sys.argv[2]))))
