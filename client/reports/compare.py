"""Bicubic beside ours: a picture of sample frames with enlarged details, or a video split in the middle."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import Interpolation

from ..durable import atomic_write
from ..errors import UpscaleError
from ..frames.windows import Image, Size
from ..pipeline import Options
from ..video.decode import Video
from ..video.encode import PNG, encode, encoding_from_options
from ..video.images import PNG_SUFFIX
from ..video.picture import Picture, Range
from ..video.source import Source, file_url
from ..video.streams import count_frames

SAMPLES = 3  # frames in a picture, evenly spread over the clip
DETAIL_PART = 6  # a detail is this part of the frame's height
LINE_PX = 4
WHITE = 255
VIDEO_SUFFIXES = (".mp4", ".mkv", ".mov")


@contextmanager
def lr_and_hr(source: Source, options: Options, upscaled: Path) -> Iterator[tuple[Video, Video]]:
    """Open a clip as it was opened to be upscaled, and what came of it; what they are like was said then."""
    decoders = logging.getLogger(Video.__module__.rpartition(".")[0])
    level = decoders.level
    decoders.setLevel(logging.ERROR)
    try:
        with (
            Video(source, options.selection, options.deinterlace) as lr,
            Video(Source(upscaled)) as hr,
        ):
            yield lr, hr
    finally:
        decoders.setLevel(level)


def compare(source: Source, options: Options, upscaled: Path, target: Path) -> None:
    """Show what upscaling gained over bicubic interpolation, which is always on the left.

    Args:
        source: The lr clip.
        options: How it was upscaled.
        upscaled: The hr clip.
        target: A ``.png`` file for sample frames, each with the detail that changed most, or a video of
            all frames, left half bicubic, right half ours.

    Raises:
        OSError, av.FFmpegError: A clip cannot be read, or the target cannot be written.
        ValueError: The two clips do not have the same number of frames.
    """
    with lr_and_hr(source, options, upscaled) as (lr, hr):
        total = count_frames(upscaled)
        aspect = hr.picture.sample_aspect_ratio
        if aspect and turns(hr.picture)[0] % 2:
            aspect = 1 / aspect
        size = upright_size(hr.picture)
        picture = replace(hr.picture, size=size, sample_aspect_ratio=aspect, display_matrix=None)
        pairs = (
            (upright(resized(before.image, hr.picture.size), hr.picture), upright(after.image, hr.picture))
            for before, after in zip(lr.frames(options.range), hr.frames(Range()), strict=True)
        )
        with atomic_write(target) as draft:
            if target.suffix.lower() == PNG_SUFFIX:
                _write_samples(draft, pairs, total, picture)
            else:
                _write_split(draft, pairs, picture)


def check_target(target: Path) -> None:
    """Refuse a name that says neither picture nor video, before the work.

    Raises:
        UpscaleError: It is refused.
    """
    if target.suffix.lower() not in (PNG_SUFFIX, *VIDEO_SUFFIXES):
        raise UpscaleError(f"expected a .png, .mp4, .mkv or .mov for --compare, found {target}")


def sample_numbers(total: int) -> set[int]:
    """Numbers of the frames that stand for a clip."""
    return {(2 * n + 1) * max(total, 1) // (2 * SAMPLES) for n in range(SAMPLES)}


def turns(picture: Picture) -> tuple[int, bool]:
    """How a player shows the picture: quarter turns counterclockwise, and whether it is mirrored before."""
    if not picture.display_matrix:
        return 0, False
    a, b, _, c, d, *_ = picture.display_matrix
    is_mirrored = a * d < b * c
    sign = -1 if is_mirrored else 1
    return round(-math.atan2(sign * b, sign * a) / (math.pi / 2)) % 4, is_mirrored


def upright(image: Image, picture: Picture) -> Image:
    """Turn and mirror an image of a clip as a player does."""
    quarters, is_mirrored = turns(picture)
    return np.ascontiguousarray(np.rot90(image[:, ::-1] if is_mirrored else image, quarters))


def upright_size(picture: Picture) -> Size:
    """(height, width) of the picture as a player shows it."""
    height, width = picture.size
    return (width, height) if turns(picture)[0] % 2 else (height, width)


def resized(image: Image, size: Size) -> Image:
    """Interpolate an (H, W, 3) image to (height, width), bicubically."""
    frame = av.VideoFrame.from_ndarray(image, format="rgb24")
    flags = Interpolation.BICUBIC | Interpolation.ACCURATE_RND
    large = frame.reformat(width=size[1], height=size[0], interpolation=flags, threads=1).to_ndarray()
    return np.asarray(large, np.uint8)


def most_changed(before: Image, after: Image) -> tuple[slice, slice]:
    """Rows and columns of the square where two images differ most."""
    height, width, _ = before.shape
    side = max(1, height // DETAIL_PART)
    rows, columns = height // side, width // side
    whole = np.s_[: rows * side, : columns * side]
    change = np.abs(before[whole].astype(np.int16) - after[whole])
    squares = change.reshape(rows, side, columns, side * 3).mean((1, 3))
    row, column = divmod(int(squares.argmax()), columns)
    return np.s_[row * side : (row + 1) * side, column * side : (column + 1) * side]


def detail(before: Image, after: Image) -> tuple[Image, Image]:
    """The same square of both images, where they differ most, enlarged to the images' height."""
    cut = most_changed(before, after)
    zoom = before.shape[0] // before[cut].shape[0]
    return before[cut].repeat(zoom, 0).repeat(zoom, 1), after[cut].repeat(zoom, 0).repeat(zoom, 1)


def _write_samples(target: Path, pairs: Iterator[tuple[Image, Image]], total: int, picture: Picture) -> None:
    chosen = sample_numbers(total)
    rows = [
        _beside([before, after, *detail(before, after)])
        for index, (before, after) in enumerate(pairs)
        if index in chosen
    ]
    sheet = _beside([row.transpose(1, 0, 2) for row in rows]).transpose(1, 0, 2)
    whole = replace(picture, size=(sheet.shape[0], sheet.shape[1]), sample_aspect_ratio=None)
    with av.open(file_url(target), "w", container_options={"update": "1"}) as container:
        encode(container, [np.ascontiguousarray(sheet)], whole, PNG)


def _beside(images: list[Image]) -> Image:
    """Put images in a row, with lines between them; the lower ones are filled up."""
    height = max(image.shape[0] for image in images)
    filled = [
        np.pad(image, ((0, height - image.shape[0]), (0, LINE_PX), (0, 0)), constant_values=WHITE)
        for image in images
    ]
    return np.concatenate(filled, axis=1)[:, :-LINE_PX]


def _write_split(target: Path, pairs: Iterator[tuple[Image, Image]], picture: Picture) -> None:
    middle = picture.size[1] // 2

    def frames() -> Iterator[Image]:
        for before, after in pairs:
            frame = after.copy()
            frame[:, :middle] = before[:, :middle]
            frame[:, middle - LINE_PX // 2 : middle + LINE_PX // 2] = WHITE
            yield frame

    with av.open(file_url(target), "w") as container:
        encode(container, frames(), picture, encoding_from_options("h264", None, None, None))
