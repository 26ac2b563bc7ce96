"""A recipe's calibration as the command line wants it."""

from pydantic import ValidationError

from klquant.errors import UserError
from klquant.recipe.schema import CalibrationParams, Recipe


def with_calibration(recipe: Recipe, tokens: int | None, window: int | None) -> Recipe:
    """The recipe with what the command line says of its calibration. A number of tokens asked for is kept to."""
    changes = {} if window is None else {"window": window}
    if tokens is not None:
        changes |= {"tokens": tokens, "max_tokens": tokens, "min_expert_tokens": 0}
    try:
        params = CalibrationParams(**recipe.calibration.model_dump() | changes)
    except ValidationError:
        old = recipe.calibration
        raise UserError(
            f"a calibration window of {window or old.window} tokens is longer than the {tokens or old.tokens} tokens "
            "to calibrate on; give more with --calib-tokens, or a shorter --window"
        ) from None
    return recipe.model_copy(update={"calibration": params})
