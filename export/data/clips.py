"""Video clips, image sequences and photos, decoded once into uint8 segments on disk."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import ColorTrc, Interpolation
from numpy.typing import NDArray

from export.errors import ExportError

log = logging.getLogger(__name__)

SEGMENT = 7  # consecutive frames kept together: the papers train on fragments of 5-7
SEGMENTS_PER_CLIP = 16  # evenly spread over the clip
MAX_FRAMES = 1200  # of one clip
TRUTH_SIDE = 540  # shorter side of truth made from large frames
# Without the latter two, swscale gives neighboring RGB pixels one chroma value.
SCALER = Interpolation.AREA | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND
CUT_LEVELS = 30.0  # mean absolute difference of consecutive frames, in gray levels, that counts as a cut
HDR_TRANSFERS = (ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67)
VIDEO_SUFFIXES = {".264", ".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpg", ".ts", ".webm", ".y4m"}
PHOTO_SUFFIXES = {".jpeg", ".jpg", ".png", ".webp"}
NUMBERS = re.compile(r"(\d*)(\D*)")  # a file name's parts

Segments = NDArray[np.uint8]
"""(S, T, H, W, 3) RGB: S segments of T consecutive frames; T = 1 for a photo."""


@dataclass(frozen=True)
class Clip:
    """Segments of one video, sequence or photo, memory-mapped."""

    name: str
    segments: Segments
    weight: float = 1.0
    """How often it is sampled, over another of its kind."""


def truth_factor(short_side: int) -> int:
    """How far lossy-coded video is reduced before it counts as truth.

    At least 2: chroma is stored at half size, and halving buries most coding artifacts.
    """
    return max(2, round(short_side / TRUTH_SIDE))


@contextmanager
def cache_file(path: Path) -> Iterator[Path]:
    """Where to write what becomes ``path`` once it is complete; several processes may do so at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.part")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def save_array(path: Path, array: NDArray[np.uint8]) -> None:
    """Write a ``.npy`` file, see `cache_file`."""
    with cache_file(path) as partial, partial.open("wb") as file:
        np.save(file, array)


def _decoded(path: Path) -> Iterator[av.VideoFrame]:
    with av.open(str(path)) as container:
        if not container.streams.video:
            raise ExportError("expected a video stream, found none")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        yield from container.decode(stream)


def images_of(folder: Path) -> list[Path]:
    """The images of a sequence in the order of their numbers: frame_2 comes before frame_10."""
    found = (p for p in folder.iterdir() if p.suffix.lower() in PHOTO_SUFFIXES and p.is_file())
    return sorted(found, key=lambda p: [(int(n), s) if n else (-1, s) for n, s in NUMBERS.findall(p.stem)])


def decode_frames(path: Path, lossless: bool) -> Iterator[NDArray[np.uint8]]:
    """Decode a file, or a folder that holds an image per frame.

    Args:
        path: the file or the folder.
        lossless: whether frames count as truth as they are; others are reduced, see ``truth_factor``.

    Yields:
        (H, W, 3) RGB; ``MAX_FRAMES`` at most.

    Raises:
        ExportError: it cannot be decoded, or is HDR.
    """
    files = images_of(path)[:MAX_FRAMES] if path.is_dir() else [path]
    count = 0
    for file in files:
        try:
            for frame in _decoded(file):
                if frame.color_trc in HDR_TRANSFERS:
                    raise ExportError("HDR transfer; expected SDR video, tone-map it first")
                factor = 1 if lossless else truth_factor(min(frame.width, frame.height))
                size = (frame.width // factor, frame.height // factor)
                rgb = frame.reformat(*size, "rgb24", interpolation=SCALER)
                yield rgb.to_ndarray().astype(np.uint8, copy=False)
                count += 1
                if count == MAX_FRAMES:
                    return
        except av.FFmpegError as err:
            where = f"{file.name} " if path.is_dir() else ""
            raise ExportError(f"{where}not decodable ({err.strerror})") from err


def _segments(frames: Sequence[NDArray[np.uint8]], length: int) -> Segments:
    """Cut evenly spread segments of ``length`` frames, none across a scene cut."""
    cuts = [i for i in range(1, len(frames)) if is_cut(frames[i - 1], frames[i])]
    starts = np.linspace(0, len(frames) - length, SEGMENTS_PER_CLIP).round().astype(int)
    good = [s for s in dict.fromkeys(starts.tolist()) if not any(s < cut < s + length for cut in cuts)]
    return np.stack([np.stack(frames[s : s + length]) for s in good]) if good else np.empty((0,), np.uint8)


def is_cut(before: NDArray[np.uint8], after: NDArray[np.uint8]) -> bool:
    """Whether a scene ends between two consecutive (H, W, 3) frames."""
    # Every fourth pixel tells a cut as well as all of them do.
    difference = np.abs(before[::4, ::4].astype(np.int16) - after[::4, ::4])
    return float(difference.mean()) > CUT_LEVELS


def load_clip(path: Path, cache: Path, *, min_side: int, photo: bool = False) -> Clip:
    """Decode ``path``, or map what an earlier run decoded.

    Args:
        path: a video, a photo, or a folder with an image per frame. Images count as truth as they are,
            videos once they are reduced.
        cache: folder of decoded segments.
        min_side: shorter side, in hr pixels, that it must have.
        photo: one image is enough.

    Raises:
        ExportError: nothing in it can serve as truth for patches of ``min_side`` pixels.
    """
    files = images_of(path) if path.is_dir() else [path]
    states = [fact for f in files for fact in (f.name, f.stat().st_size, f.stat().st_mtime_ns)]
    limits = (SEGMENT, SEGMENTS_PER_CLIP, MAX_FRAMES, TRUTH_SIDE, int(SCALER))
    rule = (*states, photo, *limits)
    stored = cache / f"{path.stem}-{hashlib.sha256(repr(rule).encode()).hexdigest()[:12]}.npy"
    if not stored.exists():
        try:
            frames = list(decode_frames(path, lossless=photo or path.is_dir()))
        except ExportError as err:
            raise ExportError(f"{path.name}: {err}") from err
        length = 1 if photo else SEGMENT
        if len(frames) < length:
            raise ExportError(f"{path.name}: expected at least {length} frames, found {len(frames)}")
        if len({frame.shape for frame in frames}) > 1:
            raise ExportError(f"{path.name}: expected one frame size, found several")
        save_array(stored, _segments(frames, length))
    segments: Segments = np.load(stored, mmap_mode="r")
    if segments.shape[0] == 0:
        raise ExportError(f"{path.name}: expected {SEGMENT} frames without a cut, found none")
    height, width = segments.shape[2:4]
    if min(height, width) < min_side:
        raise ExportError(f"{path.name}: expected at least {min_side} pixels a side, found {width}x{height}")
    return Clip(path.name, segments)


def load_folder(
    folder: Path, cache: Path, *, min_side: int, photo: bool = False, names: Sequence[str] | None = None
) -> list[Clip]:
    """Load every clip (or photo) of a folder; what cannot be used is named, skipped and counted.

    Args:
        folder: holds videos, and folders with an image per frame; or photos.
        cache: where decoded segments live; may be deleted at any time between runs.
        min_side: shorter side, in hr pixels, that a clip must have.
        photo: the folder holds photos.
        names: only these files or sequences.

    Raises:
        ExportError: nothing usable was found.
    """
    if not folder.is_dir():
        raise ExportError(f"expected a folder of clips at {folder}, found none; pass one that exists")
    suffixes = PHOTO_SUFFIXES if photo else VIDEO_SUFFIXES
    files = [p for p in folder.iterdir() if p.is_file() and p.suffix.lower() in suffixes]
    sequences = [] if photo else [p for p in folder.iterdir() if p.is_dir() and images_of(p)]
    paths = sorted([*files, *sequences])
    if names is not None:
        missing = set(names) - {p.name for p in paths}
        if missing:
            raise ExportError(
                f"expected {', '.join(sorted(missing))} in {folder}, not found; correct the list"
            )
        paths = [p for p in paths if p.name in names]
    clips: list[Clip] = []
    for path in paths:
        try:
            clips.append(load_clip(path, cache, min_side=min_side, photo=photo))
        except ExportError as err:
            log.warning("skipped %s", err)
    if not clips:
        is_sequence = not photo and images_of(folder)
        hint = "put the images of a sequence into a folder inside it" if is_sequence else "add clips"
        raise ExportError(
            f"expected clips of at least {min_side} pixels a side in {folder}, "
            f"found none among {len(paths)} files; {hint} or choose smaller patches"
        )
    log.info("%s: %d files used, %d skipped", folder, len(clips), len(paths) - len(clips))
    return clips
