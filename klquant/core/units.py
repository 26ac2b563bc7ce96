"""Numbers and lists as people read them, in the terminal and in reports."""

from math import floor, log10


def decimal(nbytes: int) -> str:
    """Decimal units with three digits: 24.3 GB."""
    value, unit = float(nbytes), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):  # noqa: B007
        if value < 999.5:
            break
        value /= 1000
    return f"{nbytes} B" if unit == "B" else f"{value:#.3g}".rstrip(".") + f" {unit}"


def tokens(number: int) -> str:
    """8 k, 128 k, 1 M in powers of two; what is none of these as it is, 1,000."""
    for size, unit in ((1 << 20, " M"), (1 << 10, " k")):
        if number >= size and number % size == 0:
            return f"{number // size}{unit}"
    return f"{number:,}"


def percent(share: float) -> str:
    """Three digits, but no more than five decimals: 0.523 %, 0.00213 %, 0.00074 %, <0.00001 %."""
    value = 100 * share
    if 0 < value < 1e-5:
        return "<0.00001 %"
    decimals = min(5, max(0, 2 - floor(log10(value)))) if value > 0 else 0
    return f"{value:.{decimals}f} %"


def some(items: list[str], most: int = 4) -> str:
    """The first few of a list, and how many more there are."""
    more = f" and {len(items) - most:,} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more
