"""`klquant eval MODEL`: how far a checkpoint is from its reference, on text."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import get_args

import click

from klquant.cli.options import evaluation_options
from klquant.evaluate.options import BaselineMethod, DtypeName, EvalOptions, StoreKind, TaskOptions
from klquant.recipe.schema import DEFAULT_RECIPE, load_recipe

_TASKS = TaskOptions(())


@click.command("eval")
@click.argument("model")
@click.option("--against", metavar="MODEL", help="The 16-bit checkpoint to compare with.")
@click.option("--as", "method", type=click.Choice(get_args(BaselineMethod)),
              help="Evaluate MODEL rounded by another method, against itself, for comparison.")  # fmt: skip
@click.option("--recipe", metavar="NAME|FILE",
              help=f"With --as: the recipe whose tensors are rounded.  [default: {DEFAULT_RECIPE}]")  # fmt: skip
@evaluation_options
@click.option("--floor", is_flag=True, help="Also measure what BF16 against FP32 arithmetic alone does.")
@click.option("--store", type=click.Choice(get_args(StoreKind)),
              help="How the reference is kept: whole, or top tokens and samples.  [default: by size]")  # fmt: skip
@click.option("--reference-cache", type=click.Path(path_type=Path), metavar="FOLDER",
              help="Where the reference pass is kept for other variants.  [default: beside the result]")  # fmt: skip
@click.option(
    "--tasks",
    metavar="NAME,…",
    help="Also answer tasks: needle (built in), or lm-eval's such as mmlu,gsm8k,humaneval, or a YAML file.",
)
@click.option("--task-limit", type=click.IntRange(1), help="Items of each task, and of each length of needle.")
@click.option("--few-shot", type=click.IntRange(0), help="Examples before a question.  [default: the task's]")
@click.option("--task-seed", type=int, default=_TASKS.seed, show_default=True, help="Of examples and needles.")
@click.option("--chat", is_flag=True, help="Ask lm-eval's tasks through the model's chat template.")
@click.option("--run-code", is_flag=True, help="Let tasks such as humaneval run programs that the model wrote.")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="The result, a JSON file.")
@click.option("--json", "as_json", is_flag=True, help="Print the result instead of a table.")
def command(
    model: str, against: str | None, method: BaselineMethod | None, recipe: str | None, data: tuple[str, ...],
    windows: int, window: int, device: str | None, dtype: DtypeName | None, floor: bool, store: StoreKind | None,
    reference_cache: Path | None, tasks: str | None, task_limit: int | None, few_shot: int | None, task_seed: int,
    chat: bool, run_code: bool, out: Path, as_json: bool,
) -> None:  # fmt: skip
    """Score MODEL on text: its divergence from the checkpoint --against, perplexity, where it differs, and its size.

    Both are folders or hub ids; MODEL is in 16 bits or quantized. The reference runs once for all its variants, layer
    by layer if it does not fit. The same command again goes on where it was stopped.
    """
    if method is not None and against is not None:
        raise click.UsageError("--as compares MODEL with itself: leave out --against")
    if recipe is not None and method is None:
        raise click.UsageError("--recipe needs --as")
    chosen = None if method is None else load_recipe(recipe or DEFAULT_RECIPE)
    from klquant.cli.eval_table import Bar, print_result
    from klquant.cli.fetch import fetch
    from klquant.core.device import pick_device
    from klquant.evaluate.baselines import baseline_of
    from klquant.evaluate.run import evaluate

    if floor and against is None and method is None:
        raise click.UsageError("--floor needs --against")
    names = tuple(name.strip() for name in (tasks or "").split(",") if name.strip())
    asked = TaskOptions(names, task_limit, few_shot, task_seed, chat, run_code)
    if asked != _TASKS and not names:
        raise click.UsageError("--task-limit, --few-shot, --task-seed, --chat and --run-code need --tasks")
    options = EvalOptions(
        data=",".join(data), windows=windows, window=window, device=str(pick_device(device)), dtype=dtype, store=store,
        reference_cache=reference_cache, floor=floor, tasks=asked if names else None,
        command=("klquant", *sys.argv[1:]),
    )  # fmt: skip
    folder, theirs = fetch([model, against], partial(_check, method, out, options))
    baseline = None if method is None else baseline_of(folder, chosen, method)
    with Bar() as bar:
        result = evaluate(folder, theirs, out, options, bar, baseline)
    if as_json:
        click.echo(json.dumps(result.model_dump(mode="json"), indent=1))
    else:
        print_result(result, out)


def _check(method: BaselineMethod | None, out: Path, options: EvalOptions) -> None:
    """Raises UserError for what needs no model to be wrong: names, files and libraries."""
    from klquant.evaluate.baselines import require_library
    from klquant.evaluate.result import Result, require_output
    from klquant.evaluate.tasks.suite import require_names
    from klquant.evaluate.text import require_text

    require_output(out, Result)
    require_text(options.data)
    if method is not None:
        require_library(method)
    if options.tasks is not None:
        require_names(options.tasks)
