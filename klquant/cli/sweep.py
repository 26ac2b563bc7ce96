"""`klquant sweep MODEL --recipes …`: quantize, evaluate and report in one go; what is finished is not done again."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import click

from klquant.cli.calibration import require_text, with_calibration
from klquant.cli.main import Failure
from klquant.cli.options import calib_tokens_option, evaluation_options, target_option
from klquant.cli.report import require_plots, write_report
from klquant.core.units import decimal
from klquant.errors import UserError
from klquant.evaluate.options import BaselineMethod, DtypeName, EvalOptions
from klquant.recipe.schema import Recipe, load_recipe

if TYPE_CHECKING:
    from klquant.checkpoint.reader import CheckpointReader
    from klquant.evaluate.baselines import BaselineModel
    from klquant.evaluate.result import Result
    from klquant.pipeline.run import RunOptions
    from klquant.recipe.plan import Plan

DEFAULT_RECIPES = "int8,int4,int3"
SETTINGS = "sweep.json"
CACHE = "reference-cache"
MODELS, RESULTS = "models", "results"
BASELINE = "baseline-"  # before the names of baselines' results


@click.command("sweep")
@click.argument("model")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), metavar="DIR",
              help="Folder for checkpoints, results and the report.")  # fmt: skip
@click.option("--recipes", default=DEFAULT_RECIPES, show_default=True, help="Built-in names or .yaml files.")
@click.option("--baselines", default="", metavar="LIST",
              help=f"Also other methods on the same tensors: {', '.join(get_args(BaselineMethod))}.")  # fmt: skip
@target_option
@click.option("--calib", multiple=True, metavar="MIX|FILE", help="Calibration text.  [default: each recipe's]")
@calib_tokens_option
@click.option("--calib-window", type=click.IntRange(min=2), metavar="N",
              help="Tokens in a calibration window.  [default: each recipe's]")  # fmt: skip
@evaluation_options
def command(
    model: str, out: Path, recipes: str, baselines: str, target: str, calib: tuple[str, ...],
    calib_tokens: int | None, calib_window: int | None, data: tuple[str, ...], windows: int, window: int,
    device: str | None, dtype: DtypeName | None,
) -> None:  # fmt: skip
    """Quantize MODEL by each recipe, evaluate every result against MODEL, and report how accuracy trades for size.

    The reference runs once. The same command goes on where it was stopped, and with more recipes adds to what is there.
    """
    require_plots()
    chosen = [with_calibration(recipe, calib_tokens, calib_window, "--calib-window") for recipe in _recipes(recipes)]
    methods = _methods(baselines)

    from klquant.cli.fetch import open_model
    from klquant.core.device import pick_device
    from klquant.evaluate.text import require_text as require_data
    from klquant.pipeline.run import RunOptions

    where = str(pick_device(device))
    sweep = Sweep(
        out, RunOptions(calib=",".join(calib) or None, device=where),
        EvalOptions(data=",".join(data), windows=windows, window=window, device=where, dtype=dtype, floor=True,
                    reference_cache=out / CACHE, command=("klquant", *sys.argv[1:])),
    )  # fmt: skip

    def check(plans, folder: Path) -> None:
        sweep.require_own(sweep.settings)
        begins = not (out / SETTINGS).exists()  # else what is finished may need no text any more
        for plan in plans:
            require_text(plan, sweep.making.calib, reads=begins)
        if begins:
            require_data(sweep.judging.data)
        sweep.require_room(plans, folder)

    reader, plans = open_model(model, chosen, target, check)
    try:
        sweep.run(reader, plans, methods)
    except KeyboardInterrupt:
        raise Failure("interrupted: the same command goes on", 130) from None


def _recipes(names: str) -> list[Recipe]:
    chosen = [load_recipe(name.strip()) for name in names.split(",") if name.strip()]
    doubles = sorted({r.name for r in chosen if sum(other.name == r.name for other in chosen) > 1})
    if doubles or not chosen:
        raise UserError(f"--recipes: {doubles[0]!r} comes twice" if doubles else "--recipes names no recipe")
    return chosen


def _methods(names: str) -> list[BaselineMethod]:
    chosen = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    for name in chosen:
        if name not in get_args(BaselineMethod):
            raise UserError(f"--baselines: unknown {name!r}; known: {', '.join(get_args(BaselineMethod))}")
    if any(name != "rtn" for name in chosen):
        from klquant.evaluate.baselines import bitsandbytes

        bitsandbytes()
    return chosen


@dataclass(frozen=True)
class Sweep:
    """Variants of a checkpoint in the folder `out`: checkpoints and results by recipe."""

    out: Path
    making: "RunOptions"
    judging: EvalOptions

    def run(self, reader: "CheckpointReader", plans: list["Plan"], methods: list[BaselineMethod]) -> None:
        from klquant.checkpoint.quantized import QuantizedReader
        from klquant.cli.render import console
        from klquant.evaluate.baselines import baselines
        from klquant.report.comparison import Comparison

        self._claim(reader)
        screen, results, others = console(), [], baselines(QuantizedReader(reader, None), plans, methods)
        for method in sorted(set(methods) - {baseline.method for baseline in others}):
            screen.print(f"no baseline {method}: a recipe of this sweep is that already")
        count = len(plans) + len(others)
        for number, plan in enumerate(plans, 1):
            screen.rule(f"{plan.recipe.name}, {number} of {count}", align="left", style="dim")
            self._make(reader, plan, screen)
            results.append((str(self._result(plan)), self._judge(reader, plan)))
            screen.print(_line(results[-1][1]))
        for number, baseline in enumerate(others, len(plans) + 1):
            screen.rule(f"{baseline.title}, a baseline, {number} of {count}", align="left", style="dim")
            file = self.out / RESULTS / f"{BASELINE}{baseline.method}-{baseline.fingerprint[:8]}.json"
            results.append((str(file), self._judge_baseline(baseline, file)))
            screen.print(_line(results[-1][1]))
        screen.rule("report", align="left", style="dim")
        comparison = Comparison.of(results)
        for form, name in ((None, "report.html"), ("md", "report.md"), ("json", "report.json")):
            write_report(comparison, self.out / name, form)
            screen.print(str(self.out / name), soft_wrap=True)

    def _make(self, reader: "CheckpointReader", plan: "Plan", screen) -> None:
        from klquant.cli.live import watcher
        from klquant.cli.pace import Work
        from klquant.evaluate.quantization import read_provenance
        from klquant.pipeline.run import quantize
        from klquant.pipeline.units import units_of

        folder = self._folder(plan)
        if (provenance := read_provenance(folder)) is not None:
            purpose = provenance.get("purpose") or {}
            if (purpose.get("plan"), purpose.get("weights")) != (plan.digest(), reader.fingerprint()):
                raise UserError(f"{folder}: made by another recipe, target or from other weights; delete it or move it")
            screen.print("quantized already")
            return
        works = {name: Work.of(decisions) for name, decisions in units_of(plan).items()}
        making = replace(self.making, resume=self._unfinished(plan).exists())
        with watcher(screen, works) as shown:
            quantize(reader, plan, folder, making, shown)

    def _judge(self, reader: "CheckpointReader", plan: "Plan") -> "Result":
        from klquant.checkpoint.quantized import QuantizedReader
        from klquant.cli.eval_table import Bar
        from klquant.evaluate.run import evaluate

        folder, file = self._folder(plan), self._result(plan)
        if found := _found(file, QuantizedReader.open(folder).files.fingerprint()):
            return found
        with Bar() as bar:
            return evaluate(folder, reader.folder, file, self.judging, bar)

    def _judge_baseline(self, baseline: "BaselineModel", file: Path) -> "Result":
        from klquant.cli.eval_table import Bar
        from klquant.evaluate.run import evaluate

        if found := _found(file, baseline.fingerprint):
            return found
        with Bar() as bar:
            return evaluate(baseline.reader.files.folder, None, file, self.judging, bar, baseline)

    def _require_text(self, model: Path) -> None:
        """Raises UserError where text is missing or too short to evaluate on: the folder would be bound to it."""
        from klquant.calibrate.documents import resolve_sources
        from klquant.calibrate.text import SELF
        from klquant.calibrate.tokenizer import load_tokenizer
        from klquant.evaluate.text import eval_text

        judging = self.judging
        eval_text(judging.data, load_tokenizer(model), windows=judging.windows, window=judging.window)
        if self.making.calib not in (None, SELF):
            for source in resolve_sources(self.making.calib, seed=0):
                next(source.open(), None)

    @property
    def settings(self) -> dict[str, object]:
        """What all variants share beside the weights."""
        judging = self.judging
        return {
            "calib": self.making.calib, "data": judging.data, "windows": judging.windows, "window": judging.window,
            "dtype": judging.dtype, "device": self.making.device.partition(":")[0],
        }  # fmt: skip

    def require_own(self, ours: dict[str, object]) -> None:
        """Raises UserError where the folder cannot be this sweep's: a checkpoint, or of other settings than `ours`."""
        from klquant.checkpoint.index import CONFIG, read_json
        from klquant.pipeline.journal import check_home

        file = self.out / SETTINGS
        if (self.out / CONFIG).exists():
            raise UserError(f"{self.out}: is a checkpoint; choose another folder for the sweep")
        theirs = read_json(file) if file.exists() else ours
        changed = [
            "other weights" if key == "weights" else f"--{key} was {_given(theirs.get(key))}, now {_given(ours[key])}"
            for key in ours
            if theirs.get(key) != ours[key]
        ]
        if changed:
            raise UserError(
                f"{self.out}: another sweep is there ({'; '.join(changed)}); repeat it so, or choose another folder"
            )
        if not self.out.exists():
            check_home(self.out)
        elif not file.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise UserError(f"{self.out}: is neither empty nor a sweep's; choose another folder")

    def _claim(self, reader: "CheckpointReader") -> None:
        """Make the folder, or find it as it was left."""
        from klquant.checkpoint.writer import write_json

        ours, file = {"weights": reader.fingerprint(), **self.settings}, self.out / SETTINGS
        self.require_own(ours)
        try:
            if not file.exists():
                self._require_text(reader.folder)
                self.out.mkdir(parents=True, exist_ok=True)
                write_json(file, ours)
            for part in (MODELS, RESULTS):
                (self.out / part).mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.out}: cannot be created: {error.strerror}; choose another folder") from None

    def require_room(self, plans: Sequence["Plan"], model: Path) -> None:
        """Raises UserError where the disk has no room for the variants that are not there yet."""
        from klquant.pipeline.room import Room, require_room

        todo = [plan for plan in plans if not self._folder(plan).exists()]
        unfinished = [self._unfinished(plan) for plan in todo]
        rooms = [Room.of(plan, model, self.making) for plan in todo]
        rooms = [room.to_go_on() if folder.exists() else room for room, folder in zip(rooms, unfinished, strict=True)]
        what = f"the {len(todo)} variants to make take" if len(todo) > 1 else "the variant to make takes"
        require_room(rooms, self.out, unfinished, what, "sweep fewer recipes")

    def _folder(self, plan: "Plan") -> Path:
        return self.out / MODELS / plan.recipe.name

    def _unfinished(self, plan: "Plan") -> Path:
        from klquant.pipeline.journal import Journal

        return Journal(self._folder(plan)).folder

    def _result(self, plan: "Plan") -> Path:
        return self.out / RESULTS / f"{plan.recipe.name}.json"


def _given(value: object) -> str:
    return "not given" if value is None else str(value)


def _found(file: Path, fingerprint: str) -> "Result | None":
    """A finished result of these weights; None where it is not there yet, or another version's: made again."""
    from klquant.evaluate.result import load_result

    try:
        found = load_result(file)
    except UserError:
        return None
    return found if found.model.fingerprint == fingerprint else None


def _line(result: "Result") -> str:
    q, size = result.overall, result.model.size
    return (
        f"{decimal(size.tensors)}, {size.bits.whole:.2f} bits a weight; KLD {q.kld.mean:.4f}, "
        f"top token the same in {q.top1.mean:.1%}, perplexity {100 * (q.perplexity_ratio.mean - 1):+.2f} %"
    )
