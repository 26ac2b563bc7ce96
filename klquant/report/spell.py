"""Numbers as the report writes them: no more digits than they deserve, equal decimals down a column."""

from collections.abc import Iterable
from math import floor, log10

from klquant.recipe.memory import GIB

MOST_DECIMALS = 6


def decimals(values: Iterable[float]) -> int:
    """Decimals that leave two digits of the smallest positive value."""
    positive = [v for v in values if v > 0]
    return min(MOST_DECIMALS, max(0, 1 - floor(log10(min(positive))))) if positive else 2


def context(tokens: int) -> str:
    """8 k, 128 k, 1 M in powers of two."""
    for size, unit in ((1 << 20, " M"), (1 << 10, " k")):
        if tokens >= size and tokens % size == 0:
            return f"{tokens // size}{unit}"
    return f"{tokens:,}"


def percent(share: float) -> str:
    """Three digits, at most five decimals: 12.3 %, 0.523 %, 0.00074 %."""
    value = 100 * share
    places = min(5, max(0, 2 - floor(log10(value)))) if value > 0 else 0
    return f"{value:.{places}f} %"


def change(ratio: float) -> str:
    """A ratio as what it adds: +0.42 %."""
    return f"{100 * (ratio - 1):+.2f} %"


def times(ratio: float) -> str:
    """12 ×, 1.4 ×."""
    return f"{ratio:.1f} ×" if ratio < 10 else f"{ratio:,.0f} ×"


def some(items: list[str], most: int = 4) -> str:
    """The first few of a list, and how many more there are."""
    more = f" and {len(items) - most:,} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more


def memory_unit(most: int) -> tuple[int, str]:
    """What to divide bytes of memory by, and its name: GiB, or MiB where the most is less than two of them."""
    return (GIB, "GiB") if most >= 2 * GIB else (1 << 20, "MiB")
