"""A video file, read: decoded lr frames with their exact times, and what its picture is like."""

from __future__ import annotations

import logging
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from math import inf
from types import TracebackType
from typing import cast

import av
from av.container import InputContainer
from av.sidedata.sidedata import SideData
from av.stream import Disposition
from av.video.stream import VideoStream

from ..errors import UpscaleError
from ..frames.windows import Image, Size
from .color import Color, color_of, rgb_from_frame
from .source import Source

log = logging.getLogger(__name__)

DECODER_THREADS = 2  # lr frames are small; the other cores are for a server that may run beside us
FALLBACK_RATE = Fraction(25)  # frames per second, for the few streams that say nothing at all
LARGEST_RATE_TERM = 2**30  # encoders keep the rate as two 32-bit integers


@dataclass(frozen=True, eq=False)
class Frame:
    """One decoded frame."""

    image: Image
    """(H, W, 3) uint8 RGB, 0..255."""
    pts: int
    """Presentation time, in ``Picture.time_base``."""


@dataclass(frozen=True)
class Picture:
    """What all frames of a clip have in common."""

    size: Size
    rate: Fraction
    """Frames per second; nominal where the frame rate varies."""
    time_base: Fraction
    """Seconds per tick of the timestamps."""
    color: Color
    sample_aspect_ratio: Fraction | None
    display_matrix: tuple[int, ...] | None
    """FFmpeg's nine integers that rotate and flip the picture on display."""


@dataclass(frozen=True)
class Range:
    """A part of a clip; times count from its first frame."""

    start_s: Fraction = Fraction(0)
    duration_s: Fraction | None = None
    frames: int | None = None
    """At most so many."""


class Video:
    """A video file open for reading.

    Args:
        source: Anything FFmpeg can read.

    Raises:
        UpscaleError: There is no picture to upscale in it.
    """

    def __init__(self, source: Source) -> None:
        self.path = source.path
        self._container = source.open()
        try:
            try:
                self._stream = main_stream(self._container)
            except StopIteration:
                found = ", ".join(sorted({stream.type for stream in self._container.streams})) or "nothing"
                raise UpscaleError(f"expected a video, found only {found} in {self.path}") from None
            self._stream.thread_type = "AUTO"
            self._stream.thread_count = DECODER_THREADS
            self._packets = self._frames = self._refused = 0
            self._shown = (0, 0)  # times of the first frame and of the end, in ticks
            self._is_read_whole = True
            self.damaged = 0
            """Frames that came out of the decoder, but not whole."""
            self._decoded = self._decode()
            first = next(self._decoded, None)
            if first is None:
                raise UpscaleError(f"expected a video, found no frame in {self.path}: check that it plays")
            self._first = first
            self.picture = self._picture(first)
        except BaseException:
            self._container.close()
            raise
        self.last_duration = 1
        """How long the frame read last is shown, in ``picture.time_base``."""

    def __enter__(self) -> Video:
        """Return the open video."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file."""
        self._container.close()

    def frames_expected(self, wanted: Range) -> int:
        """How many frames a range has by what the file says, or an estimate; 0 where it says nothing."""
        stream = self._stream
        if stream.frames:
            total = stream.frames
        elif stream.duration and stream.time_base:
            total = round(stream.duration * stream.time_base * self.picture.rate)
        else:
            total = round(Fraction(self._container.duration or 0, av.time_base) * self.picture.rate)
        rest = max(0, total - round(wanted.start_s * self.picture.rate))
        within = rest if wanted.duration_s is None else round(wanted.duration_s * self.picture.rate)
        return min(rest, within, wanted.frames or rest)

    def frames(self, wanted: Range) -> Iterator[Frame]:
        """Decode the clip once, from its first frame to its last, and convert those of a range.

        Yields:
            Frames in display order, with strictly increasing times.
        """
        nominal = max(1, round(1 / (self.picture.rate * self.picture.time_base)))
        first = pts = None
        found = 0
        for frame in chain([self._first], self._decoded):
            if (frame.height, frame.width) != self.picture.size:
                raise UpscaleError(
                    f"expected one picture size, found {frame.width}x{frame.height} after "
                    f"{self.picture.size[1]}x{self.picture.size[0]} in {self.path}: split the clip there"
                )
            pts = self._time_of(frame, pts)
            first = pts if first is None else first
            since_start_s = (pts - first) * self.picture.time_base - wanted.start_s
            if since_start_s < 0:
                continue
            if found == wanted.frames or (
                wanted.duration_s is not None and since_start_s >= wanted.duration_s
            ):
                self._is_read_whole = False
                return
            found += 1
            self.last_duration = frame.duration or nominal
            self._shown = (first, pts + self.last_duration)
            yield Frame(rgb_from_frame(frame, self.picture.color), pts)
        if not found:
            raise UpscaleError(
                f"expected frames after {float(wanted.start_s):g} s, found the end of {self.path}"
            )

    def _time_of(self, frame: av.VideoFrame, before: int | None) -> int:
        """When a frame is shown, after the one before it in any case."""
        # Containers such as AVI give only decoding times, raw streams none at all.
        found = frame.pts if frame.pts is not None else frame.dts
        if before is None:
            return found or 0
        return before + self.last_duration if found is None else max(found, before + 1)

    def _decode(self) -> Iterator[av.VideoFrame]:
        """Decode as FFmpeg does: what is broken is counted and left behind."""
        packets = self._container.demux(self._stream)
        while True:
            try:
                packet = next(packets, None)
                if packet is None:
                    return
                self._packets += bool(packet.size) and not packet.is_discard
                for frame in packet.decode():
                    self._frames += 1
                    self.damaged += frame.is_corrupt
                    yield frame
            except av.error.InvalidDataError:
                self._refused += 1

    def what_is_missing(self) -> str | None:
        """After the last frame: how the file fell short of what it promised, if it did."""
        stream, picture = self._stream, self.picture
        if not self._is_read_whole:
            return None
        seconds = float((self._shown[1] - self._shown[0]) * picture.time_base)
        promised = _declared_duration_s(stream)
        # A file may promise samples that an edit list hides, so the count alone proves nothing.
        if promised - seconds > 1.5 / picture.rate and self._packets < (stream.frames or inf):
            of_frames = f" of {stream.frames}" if stream.frames else ""
            return f"ends after {self._frames}{of_frames} frames, {seconds:.2f} s of {promised:.2f} s"
        if self._refused and self._frames < self._packets:
            return f"has {self._packets - self._frames} frames that cannot be decoded"
        return None

    def _picture(self, first: av.VideoFrame) -> Picture:
        stream = self._stream
        rate = stream.guessed_rate or stream.average_rate or FALLBACK_RATE
        if any(component.is_alpha for component in first.format.components):
            log.warning("transparency is left out")
        if first.interlaced_frame:
            log.warning("interlaced frames are upscaled as they are: better deinterlace the clip first")
        matrix = first.side_data.get("DISPLAYMATRIX")
        return Picture(
            size=(first.height, first.width),
            rate=rate if max(rate.as_integer_ratio()) < LARGEST_RATE_TERM else rate.limit_denominator(1001),
            time_base=stream.time_base or 1 / rate,
            color=color_of(first),
            sample_aspect_ratio=stream.sample_aspect_ratio or None,
            display_matrix=struct.unpack("=9i", bytes(cast(SideData, matrix))) if matrix else None,
        )


def _declared_duration_s(stream: VideoStream) -> float:
    """How long the picture is by what the file says of this stream; 0 where it says nothing."""
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    clock = re.fullmatch(r"(\d+):(\d\d):(\d\d\.?\d*)", stream.metadata.get("DURATION", ""))  # Matroska
    hours, minutes, seconds = clock.groups() if clock else (0, 0, 0)
    return float(hours) * 3600 + float(minutes) * 60 + float(seconds)


def main_stream(container: InputContainer) -> VideoStream:
    """The stream with the picture; a cover image is none.

    Raises:
        StopIteration: There is no picture.
    """
    return next(s for s in container.streams.video if not s.disposition & Disposition.attached_pic)
