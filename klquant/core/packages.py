"""Packages that klquant does without where they are absent."""

import importlib.util
from functools import cache


@cache
def is_installed(package: str) -> bool:
    """Whether it is there; it is not imported."""
    return importlib.util.find_spec(package) is not None
