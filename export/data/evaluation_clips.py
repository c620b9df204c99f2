"""Whole clips with their truth, to be scored: videos, and test sets as they are published."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from export.data.clips import (
    MAX_FRAMES,
    SCALER,
    TRUTH_SIDE,
    VIDEO_SUFFIXES,
    cache_file,
    decode_frames,
    images_of,
)
from export.data.degradations import degrade
from export.errors import ExportError
from export.spec import SCALE

TRUTH_FOLDERS = ("GT", "gt", "HR", "hr", "truth", "original", "sharp")
"""Names under which test sets keep their truth: Vid4 and REDS4 as in BasicSR, UDM10 as in PFNL."""

Frames = NDArray[np.uint8]
"""(T, H, W, 3) RGB."""


@dataclass(frozen=True)
class EvaluationClip:
    """Consecutive frames of one clip: what is given to a network, and what it should answer."""

    name: str
    truth: Frames
    """(T, 4h, 4w, 3)."""
    lr: Frames
    """(T, h, w, 3)."""


@dataclass(frozen=True)
class Source:
    """Where a clip lies."""

    name: str
    truth: Path
    """A video, or a folder of images."""
    lr: Path | None
    """A folder of images; None: made from the truth."""


def find_sources(
    folder: Path, *, lr_folder: str | None = None, names: Sequence[str] | None = None
) -> list[Source]:
    """Find the clips of a folder, by name.

    A clip is a video, or a folder of images. The images may lie one folder deeper, in one of
    ``TRUTH_FOLDERS``, either in each clip's folder (``UDM10/archpeople/truth``) or above all of them
    (``Vid4/GT/calendar``).

    Args:
        folder: holds the clips.
        lr_folder: name of the folder beside the truth's that holds lr frames, such as ``BIx4``.
        names: only these clips.

    Raises:
        ExportError: there are no clips, or not those that were named.
    """
    if not folder.is_dir():
        raise ExportError(f"expected a folder of clips at {folder}, found none; pass one that exists")
    sources = _sources(folder, lr_folder)
    missing = set(names or ()) - {source.name for source in sources}
    if missing:
        raise ExportError(f"expected {', '.join(sorted(missing))} in {folder}, not found; correct the list")
    found = [source for source in sources if names is None or source.name in names]
    if not found:
        raise ExportError(
            f"expected videos or folders of images in {folder}, found none; a clip's images go into a folder "
            "of their own"
        )
    return found


def _sources(folder: Path, lr_folder: str | None) -> list[Source]:
    above = _truth_folder(folder)
    if above and not images_of(above):  # GT/calendar/*.png
        clips = [path for path in sorted(above.iterdir()) if _is_clip(path)]
        return [Source(p.name, p, folder / lr_folder / p.name if lr_folder else None) for p in clips]
    sources = []
    for path in sorted(folder.iterdir()):
        inner = _truth_folder(path) if path.is_dir() else None
        if inner:  # archpeople/truth/*.png
            sources.append(Source(path.name, inner, path / lr_folder if lr_folder else None))
        elif _is_clip(path):
            if lr_folder:
                raise ExportError(
                    f"expected the truth of {path.name} in a folder named {', '.join(TRUTH_FOLDERS)}, beside "
                    f"{lr_folder!r}, found none; leave --lr-folder out to reduce {path.name} itself"
                )
            sources.append(Source(path.name, path, None))
    return sources


def _truth_folder(folder: Path) -> Path | None:
    return next((folder / name for name in TRUTH_FOLDERS if (folder / name).is_dir()), None)


def _is_clip(path: Path) -> bool:
    return bool(images_of(path)) if path.is_dir() else path.suffix.lower() in VIDEO_SUFFIXES


def load_evaluation_clip(
    source: Source, cache: Path, *, degradation: str = "bi", frames: int | None = None, min_side: int = 1
) -> EvaluationClip:
    """Read a clip. Images count as truth as they are, videos once reduced, see ``clips.truth_factor``.

    Args:
        source: where it lies.
        cache: where decoded frames are kept; may be deleted at any time between runs.
        degradation: how lr frames are made, if the source has none; see `degrade`.
        frames: at most so many, from the middle of the clip; None: all.
        min_side: shorter side, in hr pixels, that it must have.

    Raises:
        ExportError: it cannot be decoded, is too small, or its lr frames do not fit its truth.
    """
    try:
        return _load(source, cache, degradation, frames, min_side)
    except ExportError as err:
        raise ExportError(f"{source.name}: {err}") from err


def _load(source: Source, cache: Path, degradation: str, count: int | None, min_side: int) -> EvaluationClip:
    truth = _middle(_decoded(source.truth, cache), count)
    t, height, width, _ = truth.shape
    if min(height, width) < min_side:
        raise ExportError(f"expected at least {min_side} pixels a side, found {width}x{height}")
    h, w = (side // SCALE for side in (height, width))
    truth = truth[:, : h * SCALE, : w * SCALE]
    if source.lr is None:
        return EvaluationClip(source.name, truth, degrade(degradation, truth))
    if not source.lr.is_dir():
        raise ExportError(f"expected its lr frames in {source.lr}, found no folder; correct --lr-folder")
    lr = _middle(_decoded(source.lr, cache), count)
    if lr.shape != (t, h, w, 3):
        raise ExportError(
            f"expected {t} lr frames of {w}x{h} in {source.lr}, found {lr.shape[0]} of "
            f"{lr.shape[2]}x{lr.shape[1]}"
        )
    return EvaluationClip(source.name, truth, lr)


def _middle(frames: Frames, count: int | None) -> Frames:
    if count is None or count >= len(frames):
        return frames
    first = (len(frames) - count) // 2
    return frames[first : first + count]


def _decoded(path: Path, cache: Path) -> Frames:
    """All frames, memory-mapped from the cache."""
    files = images_of(path) if path.is_dir() else [path]
    states = [fact for f in files for fact in (f.name, f.stat().st_size, f.stat().st_mtime_ns)]
    rule = (str(path.resolve()), *states, MAX_FRAMES, TRUTH_SIDE, int(SCALER))
    stored = cache / f"{path.stem}-all-{hashlib.sha256(repr(rule).encode()).hexdigest()[:12]}.npy"
    if not stored.exists():
        frames = list(decode_frames(path, lossless=path.is_dir()))
        if not frames:
            raise ExportError("expected frames, found none")
        if len({frame.shape for frame in frames}) > 1:
            raise ExportError("expected one frame size, found several")
        with cache_file(stored) as partial:
            array = np.lib.format.open_memmap(partial, "w+", np.uint8, (len(frames), *frames[0].shape))
            for index, frame in enumerate(frames):
                array[index] = frame
            array.flush()
    mapped: Frames = np.load(stored, mmap_mode="r")
    return mapped
