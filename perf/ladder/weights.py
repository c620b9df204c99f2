"""Weights of a rung: the committed checkpoint of its width table."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from export.checkpoint import FOLDER
from export.network import WIDTHS, count
from perf.clip import Size
from perf.ladder.rungs import CannotRunError


def find_weights(name: str, folder: Path = FOLDER) -> Path:
    """The checkpoint of a width table, among those in ``folder``.

    Raises:
        CannotRunError: There is none.
    """
    path = folder / f"mst_gan_{name}.safetensors"
    if not path.is_file():
        raise CannotRunError(f"no weights: {path.name} is not among export/checkpoints/")
    return path


@cache
def cost(name: str, size: Size) -> tuple[int, float]:
    """Parameters, and operations per frame (2 x MAC, convolutions) at an lr size.

    Raises:
        CannotRunError: No table of this name.
    """
    if name not in WIDTHS:
        raise CannotRunError(f"no such network: export/network/widths.py has {', '.join(WIDTHS)}")
    return count(WIDTHS[name], size)
