"""The report reads results, not checkpoints: it can be made on a machine that has neither model nor GPU."""

from pathlib import Path

import klquant.report
from tests.test_layers import imports

ALLOWED = {
    "klquant.errors", "klquant.evaluate.result", "klquant.evaluate.sensitivity_result", "klquant.evaluate.tasks.record",
    "klquant.recipe.memory", "klquant.core.units",
}  # fmt: skip


def test_the_report_knows_the_results_schema_the_cards_and_units_only():
    folder = Path(klquant.report.__file__).parent
    used = {module for path in folder.glob("*.py") for module in imports(path)}
    assert {module for module in used if not module.startswith("klquant.report")} <= ALLOWED
