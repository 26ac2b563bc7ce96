"""Numbers as the report writes them: no more digits than they deserve, equal decimals down a column."""

from collections.abc import Iterable
from math import floor, log10

from klquant.recipe.memory import GIB

MOST_DECIMALS = 6


def decimals(values: Iterable[float]) -> int:
    """Decimals that leave two digits of the smallest positive value."""
    positive = [v for v in values if v > 0]
    return min(MOST_DECIMALS, max(0, 1 - floor(log10(min(positive))))) if positive else 2


def change(ratio: float) -> str:
    """A ratio as what it adds: +0.42 %."""
    return f"{100 * (ratio - 1):+.2f} %"


def times(ratio: float) -> str:
    """12 ×, 1.4 ×."""
    return f"{ratio:.1f} ×" if ratio < 10 else f"{ratio:,.0f} ×"


def memory_unit(most: int) -> tuple[int, str]:
    """What to divide bytes of memory by, and its name: GiB, or MiB where the most is less than two of them."""
    return (GIB, "GiB") if most >= 2 * GIB else (1 << 20, "MiB")
