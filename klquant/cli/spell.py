"""Durations, names and sizes as the commands print them, and as they are typed."""

import re

import click

from klquant.checkpoint.names import place_of
from klquant.errors import UserError

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kMGT]?i?B?)", re.IGNORECASE)
_PREFIX = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def duration(seconds: float) -> str:
    """12.3 s, 4 min 02 s, 1 h 20 min."""
    if seconds < 99.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    return f"{minutes // 60:,} h {minutes % 60:02} min"


def about(seconds: float) -> str:
    """A guess: no more digits than it deserves. 40 s, 4 min, 1 h 20 min."""
    if seconds < 95:
        return f"{max(5, 5 * round(seconds / 5))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60:02} min"


def place(module: str) -> tuple[str, str]:
    """A module's layer and its name in there: ("layer 3", "experts.5.w2"); ("", "lm_head") outside the layers."""
    found = place_of(module)
    return ("" if found.layer is None else found.unit), found.name


def unicode_text(text: str, what: str) -> str:
    """What was typed, on a command line or on stdin, as UTF-8 whatever the locale: bytes that the locale does not know
    stand in `text` as surrogates. Raises UserError naming `what` when it is no text."""
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError:
        raise UserError(f"{what} is not UTF-8 text") from None


# A smaller number without a unit is a forgotten one.
LEAST_BARE = 1_000_000


class Size(click.ParamType):
    """Bytes as people write them: 5GB, 500 MB, 2GiB, 1000000."""

    name = "size"

    def __init__(self, least: int = 1) -> None:
        self.least = least

    def convert(self, value, param, ctx) -> int:
        if isinstance(value, int):
            return value
        match = _SIZE.fullmatch(value.strip())
        if match is None:
            self.fail(f"{value!r} is not a size; write 5GB, 500MB or 2GiB", param, ctx)
        unit = match[2].lower().removesuffix("b")
        base = 1024 if unit.endswith("i") else 1000
        size = int(float(match[1]) * base ** _PREFIX[unit.removesuffix("i")])
        if not match[2] and 0 < float(match[1]) < LEAST_BARE:
            self.fail(f"{value!r} has no unit and would be bytes; did you mean {match[1]}GiB?", param, ctx)
        if size < self.least:
            self.fail("a size must be at least one byte", param, ctx)
        return size
