"""Sizes as people read them."""


def decimal(nbytes: int) -> str:
    """Decimal units with three digits: 24.3 GB."""
    value, unit = float(nbytes), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):  # noqa: B007
        if value < 999.5:
            break
        value /= 1000
    return f"{nbytes} B" if unit == "B" else f"{value:#.3g}".rstrip(".") + f" {unit}"
