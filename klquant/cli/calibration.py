"""Whether the text to calibrate on is there, asked before any work."""

from klquant.calibrate.documents import SELF, resolve_sources
from klquant.errors import UserError
from klquant.recipe.plan import Plan


def require_text(plan: Plan, calib: str | None = None) -> None:
    """Raises UserError where `calib`, or else what the recipe names, does not exist: the recipe's by file and line."""
    spec = calib or plan.recipe.calibration.mix
    if spec == SELF or not plan.needs_calibration:
        return
    try:
        resolve_sources(spec, seed=0)
    except UserError as error:
        raise UserError(str(error) if calib else f"{plan.recipe.mix_at()}: {error}") from None
