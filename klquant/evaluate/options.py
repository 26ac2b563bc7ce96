"""What a user may choose of an evaluation, and who hears how it goes. Light: `--help` reads its defaults here."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

StoreKind = Literal["full", "topk"]
DtypeName = Literal["float32", "bfloat16"]
BaselineMethod = Literal["rtn", "nf4", "nf4-double", "int8"]
By = Literal["class", "layer"]


@dataclass(frozen=True)
class TaskOptions:
    """`names`: lm-eval's tasks and groups, YAML files of such, or klquant's needle tasks. `limit`: items of each (of
    each length of a needle); `few_shot`: examples before a question; None for both: as the task has it. `chat`: through
    the model's chat template. `run_code`: programs that a model writes may be run."""

    names: tuple[str, ...]
    limit: int | None = None
    few_shot: int | None = None
    seed: int = 0
    chat: bool = False
    run_code: bool = False


@dataclass(frozen=True)
class EvalOptions:
    """What may be chosen beside model, reference and output.

    `dtype` None: BF16 on a GPU, FP32 on a CPU. `store` None: whole distributions of the reference while they take
    little disk, else top tokens and samples. `reference_cache` None: a folder beside the result. `command` is for the
    record.
    """

    data: str = "default"
    windows: int = 8
    window: int = 2048
    device: str = "cpu"
    dtype: DtypeName | None = None
    store: StoreKind | None = None
    reference_cache: Path | None = None
    floor: bool = False
    tasks: TaskOptions | None = None
    command: tuple[str, ...] = ()


class Watcher(Protocol):
    """Hears of every stage (`begin`), of work done in it, in tokens that passed a layer, and of what a user should
    know (`note`)."""

    def begin(self, stage: str, total: int) -> None: ...

    def advance(self, work: int) -> None: ...

    def note(self, text: str) -> None: ...


class Silent:
    """A watcher that does not look."""

    def begin(self, stage: str, total: int) -> None:
        pass

    def advance(self, work: int) -> None:
        pass

    def note(self, text: str) -> None:
        pass
