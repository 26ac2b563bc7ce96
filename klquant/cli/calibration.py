"""A recipe's calibration as the command line wants it."""

from typing import TYPE_CHECKING

from pydantic import ValidationError

from klquant.errors import UserError
from klquant.recipe.schema import CalibrationParams, Recipe

if TYPE_CHECKING:
    from klquant.recipe.plan import Plan


def with_calibration(recipe: Recipe, tokens: int | None, window: int | None, option: str) -> Recipe:
    """The recipe with what the command line says of its calibration, the window by `option`. A number of tokens asked
    for is kept to, but for what fills the last window."""
    changes = {} if window is None else {"window": window}
    if tokens is not None:
        length = window or recipe.calibration.window
        whole = -(-tokens // length) * length if tokens >= length else tokens
        changes |= {"tokens": whole, "max_tokens": whole, "min_expert_tokens": 0}
    try:
        params = CalibrationParams(**recipe.calibration.model_dump() | changes)
    except ValidationError:
        old = recipe.calibration
        raise UserError(
            f"a calibration window of {window or old.window} tokens is longer than the {tokens or old.tokens} tokens "
            f"to calibrate on; give more with --calib-tokens, or a shorter {option}"
        ) from None
    return recipe.model_copy(update={"calibration": params})


def require_text(plan: "Plan", calib: str | None = None, reads: bool = True) -> None:
    """Raises UserError where `calib`, or else what the recipe names, does not exist: the recipe's by file and line.
    Where the command `reads` it, also where what that takes is not installed."""
    from klquant.calibrate.documents import SELF, require_readable, resolve_sources

    spec = calib or plan.recipe.calibration.mix
    if spec == SELF or not plan.needs_calibration:
        return
    try:
        if reads:
            require_readable(spec)
        else:
            resolve_sources(spec, seed=0)
    except UserError as error:
        raise UserError(str(error) if calib else f"{plan.recipe.mix_at()}: {error}") from None
