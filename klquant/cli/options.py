"""Options that several commands have, declared once so that they mean and say the same everywhere."""

from collections.abc import Callable
from typing import get_args

import click

from klquant.evaluate.options import DtypeName, EvalOptions
from klquant.recipe.schema import DEFAULT_RECIPE
from klquant.recipe.targets import DEFAULT_TARGET, TARGETS

Decorator = Callable[[Callable], Callable]
_EVAL = EvalOptions()


def in_order(*options: Decorator) -> Decorator:
    """One decorator of several; --help lists them in this order."""

    def decorate(command: Callable) -> Callable:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


recipe_option = click.option(
    "--recipe", default=DEFAULT_RECIPE, show_default=True, help="A built-in recipe's name or a .yaml file."
)
target_option = click.option(
    "--target", type=click.Choice(list(TARGETS)), default=DEFAULT_TARGET, show_default=True,
    help="The engine that will load the result.",
)  # fmt: skip
calib_tokens_option = click.option(
    "--calib-tokens", type=click.IntRange(min=1), metavar="N",
    help="Calibrate on N tokens, rounded up to whole windows.  [default: the recipe's, more where experts get few]",
)  # fmt: skip
# On what text a model is judged, and with what arithmetic.
evaluation_options = in_order(
    click.option("--data", multiple=True, default=(_EVAL.data,), show_default=True,
                 help="Text to evaluate on: files, folders of them, or a mix; each file is a domain. Can be repeated."),
    click.option("--windows", type=click.IntRange(1), default=_EVAL.windows, show_default=True,
                 help="Windows a domain."),
    click.option("--window", type=click.IntRange(2), default=_EVAL.window, show_default=True,
                 help="Tokens of a window to evaluate."),
    click.option("--device", "--devices", metavar="cpu|cuda|cuda:N",
                 help="Where to compute.  [default: cuda, or cpu without a GPU]"),
    click.option("--dtype", type=click.Choice(get_args(DtypeName)),
                 help="Evaluation's arithmetic.  [default: bfloat16 on a GPU, float32 on a CPU]"),
)  # fmt: skip
