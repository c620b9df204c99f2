"""Decoded frames of a clip to RGB images of one size, each by its own size, pixel format and colors."""

from __future__ import annotations

import logging
from fractions import Fraction

import av

from ..errors import UpscaleError
from ..frames.windows import Image, Size
from .color import Color, color_of, rgb_from_frame
from .orientation import UPRIGHT, is_sideways, upright
from .source import Source
from .stills import tags_of

log = logging.getLogger(__name__)

FULL_RANGE = "yuvj", "yuv"  # an old name of the same format with full range, which the colors tell


class Converter:
    """Converts the frames of one clip.

    Recordings put one after the other, and those that adapt to a network, change in the middle: they go on
    in the size of the first frame, as FFmpeg has it.

    Args:
        source: The clip.
        first: Its first frame; ``pts`` is set, as in all others.
        tick_s: Seconds per tick of the times of frames.
        rate: Frames per second.
    """

    def __init__(self, source: Source, first: av.VideoFrame, tick_s: Fraction, rate: Fraction) -> None:
        self._path, self._first, self._tick_s, self._rate = source.path, first, tick_s, rate
        self._stills = source.files() if source.is_stills else []
        self._told: set[str] = set()
        self.color = color_of(first)
        """Of the first frame."""
        self._stored = first.height, first.width
        self.size = _upright_size(self._stored, self._orientation(first))
        """(height, width) of every image."""
        for tags in map(tags_of, self._stills):
            if tags.size:
                self._check_size(_upright_size(tags.size, tags.orientation))

    def image(self, frame: av.VideoFrame) -> Image:
        """Convert a frame, and turn a still image upright.

        Returns:
            (H, W, 3) uint8 RGB, 0..255, of ``size``.

        Raises:
            UpscaleError: It changes in a way that one clip cannot show.
        """
        color = color_of(frame)
        self._say_what_changes(frame, color)
        if not self._stills:
            return rgb_from_frame(frame, color, self._stored)
        image = upright(rgb_from_frame(frame, color), self._orientation(frame))
        self._check_size(image.shape[:2])
        return image

    def _check_size(self, size: tuple[int, ...]) -> None:
        if size != self.size:
            raise UpscaleError(
                f"expected images of one size, found {size[1]}x{size[0]} and {self.size[1]}x{self.size[0]} "
                f"in {self._path}: sort them first"
            )

    def _orientation(self, frame: av.VideoFrame) -> int:
        """EXIF's orientation of a still image."""
        number = round((frame.pts or 0) * self._tick_s * self._rate) if self._stills else 0
        return tags_of(self._stills[number]).orientation if number < len(self._stills) else UPRIGHT

    def _say_what_changes(self, frame: av.VideoFrame, color: Color) -> None:
        """Tell the user of each kind of change once, where it is met first."""
        first = self._first
        if color.is_hdr != self.color.is_hdr:
            raise UpscaleError(
                f"expected one dynamic range, found that it changes at {self._time_of(frame)} in "
                f"{self._path}: split the clip there"
            )
        changes = {}
        if (frame.height, frame.width) != self._stored and not self._stills:
            changes["size"] = f"{frame.width}x{frame.height} instead of {first.width}x{first.height}"
        if frame.format.name.replace(*FULL_RANGE) != first.format.name.replace(*FULL_RANGE):
            changes["pixel format"] = f"{frame.format.name} instead of {first.format.name}"
        if color != self.color:
            changes["colors"] = f"{color} instead of {self.color}"
        new = {kind: change for kind, change in changes.items() if kind not in self._told}
        if new:
            self._told |= new.keys()
            log.warning(
                "%s changes at %s (%s): each frame is converted by its own description, and the output stays "
                "as it begins",
                self._path,
                self._time_of(frame),
                "; ".join(f"{kind} {change}" for kind, change in new.items()),
            )

    def _time_of(self, frame: av.VideoFrame) -> str:
        return f"{float(((frame.pts or 0) - (self._first.pts or 0)) * self._tick_s):.2f} s"


def _upright_size(size: Size, orientation: int) -> Size:
    height, width = size
    return (width, height) if is_sideways(orientation) else size
