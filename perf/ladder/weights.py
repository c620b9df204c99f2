"""Weights of a rung: the committed checkpoint, or, where the baseline has none, the pruned one widened."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from export.checkpoint import FOLDER, load_checkpoint, save_checkpoint
from export.errors import ExportError
from export.network import BASELINE, PRUNED, WIDTHS, MstGan, Widths, count
from perf.clip import Size
from perf.errors import PerfError
from perf.ladder.rungs import CannotRunError

ADDED_STD = 0.02  # of the added channels' weights: alive through all layers, and far from overflow
WIDENED = "weights: the pruned ones, widened; same answers, the baseline's work"


@dataclass(frozen=True)
class Weights:
    """A checkpoint and what a reader must know about it."""

    path: Path
    note: str = ""


def find_weights(name: str, work: Path, folder: Path = FOLDER) -> Weights:
    """The checkpoint of a width table.

    Args:
        name: Of the table.
        work: Where a widened checkpoint goes.
        folder: Where checkpoints lie.

    Raises:
        CannotRunError: There is none.
        PerfError: The one to widen is not readable.
    """
    path = folder / f"mst_gan_{name}.safetensors"
    if path.is_file():
        return Weights(path)
    source = folder / f"mst_gan_{PRUNED.name}.safetensors"
    if name != BASELINE.name or not source.is_file():
        raise CannotRunError(f"no weights: {path.name} is not among export/checkpoints/")
    widened = work / path.name
    try:
        save_checkpoint(widen(load_checkpoint(source), BASELINE), widened, {"widened_from": source.name})
    except ExportError as err:
        raise PerfError(str(err)) from err
    return Weights(widened, WIDENED)


def widen(narrow: MstGan, widths: Widths) -> MstGan:
    """The same function in wider layers.

    Pruning takes channels off the ends of inner layers only, so adding some back changes nothing if no old
    channel listens to a new one. The new ones get weights, not zeros: a library that skips zeros must not
    be able to tell.
    """
    wide = MstGan(widths)
    random = torch.Generator().manual_seed(0)
    state = wide.state_dict()
    for key, old in narrow.state_dict().items():
        shape = state[key].shape
        if shape == old.shape:
            state[key] = old
            continue
        state[key] = torch.randn(shape, generator=random) * ADDED_STD
        state[key][: len(old)] = 0
        state[key][tuple(map(slice, old.shape))] = old
    wide.load_state_dict(state)
    return wide.eval().requires_grad_(False)


@cache
def cost(name: str, size: Size) -> tuple[int, float]:
    """Parameters, and operations per frame (2 x MAC, convolutions) at an lr size.

    Raises:
        CannotRunError: No table of this name.
    """
    if name not in WIDTHS:
        raise CannotRunError(f"no such network: export/network/widths.py has {', '.join(WIDTHS)}")
    return count(WIDTHS[name], size)
