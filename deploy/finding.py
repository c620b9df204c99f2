"""What a check of ``make doctor`` has found."""

from dataclasses import dataclass

LEVELS = ("ok", "warn", "error")


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    level: str
    """One of ``LEVELS``."""
    check: str
    text: str
    fix: str = ""
    """Flag or command; empty where nothing is to be done."""
