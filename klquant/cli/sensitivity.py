"""`klquant sensitivity MODEL`: what each class, or layer, costs when only it is quantized."""

import json
import sys
from functools import partial
from math import isnan
from pathlib import Path
from typing import get_args

import click

from klquant.cli.options import evaluation_options
from klquant.evaluate.options import By, DtypeName, EvalOptions
from klquant.recipe.schema import DEFAULT_RECIPE, load_recipe


@click.command("sensitivity")
@click.argument("model")
@click.option("--recipe", metavar="NAME|FILE",
              help=f"Round parts to nearest on this recipe's grids.  [default: {DEFAULT_RECIPE}]")  # fmt: skip
@click.option("--quantized", type=click.Path(path_type=Path), metavar="CHECKPOINT",
              help="Take parts from this quantized checkpoint of MODEL instead.")  # fmt: skip
@click.option("--by", type=click.Choice(get_args(By)), default="class", show_default=True, help="What a part is.")
@click.option("--minutes", type=click.FloatRange(0), metavar="N",
              help="Begin no part that would not end within N minutes; one at least.  [default: all]")  # fmt: skip
@evaluation_options
@click.option("--reference-cache", type=click.Path(path_type=Path), metavar="FOLDER",
              help="Where klquant eval keeps its reference pass.  [default: beside the result]")  # fmt: skip
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="The result, a JSON file.")
@click.option("--json", "as_json", is_flag=True, help="Print the result instead of a table.")
def command(
    model: str, recipe: str | None, quantized: Path | None, by: By, minutes: float | None, data: tuple[str, ...],
    windows: int, window: int, device: str | None, dtype: DtypeName | None, reference_cache: Path | None, out: Path,
    as_json: bool,
) -> None:  # fmt: skip
    """Measure what each class of tensors, or each layer, costs: the divergence from MODEL when only that is quantized.

    MODEL is in 16 bits, a folder or a hub id (owner/name). Parts are rounded without calibration, or taken from a
    quantized checkpoint. The result is one for klquant report. The same command again measures what is missing.
    """
    if recipe is not None and quantized is not None:
        raise click.UsageError("--recipe and --quantized exclude each other")
    if minutes is not None and isnan(minutes):
        raise click.UsageError("--minutes is no number of minutes; leave it out for all parts")
    quantizer = quantized or load_recipe(recipe or DEFAULT_RECIPE)
    from klquant.cli.eval_table import Bar
    from klquant.cli.fetch import fetch
    from klquant.cli.sensitivity_table import print_sensitivity
    from klquant.core.device import pick_device
    from klquant.evaluate.sensitivity import sensitivity

    options = EvalOptions(
        data=",".join(data), windows=windows, window=window, device=str(pick_device(device)), dtype=dtype,
        reference_cache=reference_cache, command=("klquant", *sys.argv[1:]),
    )  # fmt: skip
    (folder,) = fetch([model], partial(_check, quantized, out, options))
    with Bar() as bar:
        result = sensitivity(folder, quantizer, out, by, options, minutes, bar)
    if as_json:
        click.echo(json.dumps(result.model_dump(mode="json"), indent=1))
    else:
        print_sensitivity(result, out)


def _check(quantized: Path | None, out: Path, options: EvalOptions) -> None:
    """Raises UserError for what needs no model to be wrong: names, files and libraries."""
    from klquant.checkpoint.index import require_folder
    from klquant.evaluate.result import require_output
    from klquant.evaluate.sensitivity_result import Sensitivity
    from klquant.evaluate.text import require_text

    require_output(out, Sensitivity)
    require_text(options.data)
    if quantized is not None:
        require_folder(quantized)
