"""A video file, read: decoded lr frames with their exact times, and what its picture is like."""

from __future__ import annotations

import logging
import re
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import ExitStack
from fractions import Fraction
from itertools import chain
from math import ceil, inf
from types import TracebackType

import av
from av.video.stream import VideoStream

from ..errors import UpscaleError
from ..record import NOTHING, Record
from .boundary import UNDECODABLE, guarded, media_errors
from .clock import packets_of
from .convert import Converter
from .deinterlace import OFF, progressive
from .orientation import display_matrix
from .picture import Frame, Picture, Range
from .seek import Seek, seek
from .source import Source
from .stills import count_images
from .streams import EVERY_STREAM, Selection, is_cover, main_stream, needs_dolby_vision
from .whole import what_is_cut_off
from .y4m import Y4M_FORMAT, rest_of_frame

log = logging.getLogger(__name__)

DECODER_THREADS = 2  # lr frames are small; the other cores are for a server that may run beside us
FALLBACK_RATE = Fraction(25)  # frames per second, for the few streams that say nothing at all
LARGEST_RATE_TERM = 2**30  # encoders keep the rate as two 32-bit integers
MOST_WITHOUT_TIME = 32  # frames at the beginning that are kept until one has a time
STEPS_BACK = 2  # frames by which times step back where another recording begins
DURATION_IS_END = ("asf",)  # containers whose streams are as long as until the end of the last
PAGED_SUFFIXES = frozenset((".tif", ".tiff", ".webp"))  # of which FFmpeg shows one image, or none
ALPHA = ("alpha_mode", "1")  # Matroska's tag of VP8 and VP9, whose decoder leaves transparency out


class Video:
    """A video file open for reading.

    Args:
        source: Anything FFmpeg can read.
        selection: Streams that are wanted; the picture is one of them.
        deinterlace: One of ``DEINTERLACE``: no frames, those that say they are interlaced, or all.

    Raises:
        UpscaleError: There is no picture to upscale in it.
    """

    def __init__(self, source: Source, selection: Selection = EVERY_STREAM, deinterlace: str = OFF) -> None:
        self.path = source.path
        self._source, self._selection, self._deinterlace = source, selection, deinterlace
        self._files = ExitStack()
        self._what_fails = f"cannot read {self.path}"
        self._container = self._files.enter_context(source.open())
        try:
            with media_errors(self._what_fails):
                self._open(source, selection, deinterlace)
        except BaseException:
            self._files.close()
            raise
        self.last_duration = 1
        """How long the frame read last is shown, in ``picture.time_base``."""

    def _open(self, source: Source, selection: Selection, deinterlace: str) -> None:
        selection.check(len(self._container.streams), self.path)
        try:
            self._stream = main_stream(self._container, selection)
        except StopIteration:
            kinds = {"cover" if is_cover(one) else one.type for one in self._container.streams}
            found = ", ".join(sorted(kinds)) or "nothing"
            raise UpscaleError(f"expected a video, found only {found} in {self.path}") from None
        if self._stream.codec_context is None:
            raise UpscaleError(f"expected a video that FFmpeg can decode, found none in {self.path}")
        _use_threads(self._stream)
        self._packets = self._frames = self._before_start = 0
        self.refused = 0
        """Packets that could not be decoded."""
        self._repeated_until = self._packet_bytes = 0
        self._lead_s = Fraction(0)  # from the first packet to the first frame that can be decoded
        self._shown = (0, 0)  # times of the first frame and of the end, in ticks
        self._is_read_whole = True
        self._told: set[str] = set()
        self.damaged = 0
        """Frames that came out of the decoder, but not whole."""
        self._decoded = progressive(self._with_times(self._decode()), self._stream, deinterlace)
        first = next(self._decoded, None)
        images = count_images(source.path) if source.path.suffix.lower() in PAGED_SUFFIXES else 1
        if first is None and images > 1:
            raise UpscaleError(
                f"expected a still image, found an animation of {images} frames in {self.path}, which FFmpeg "
                "does not decode: convert it to a GIF or a video first"
            )
        if first is None:
            why = " that can be decoded" if self.refused else ""
            raise UpscaleError(f"expected a video, found no frame{why} in {self.path}: check that it plays")
        self._first = first
        if images > 1:
            log.warning("of %d images in %s, the first is taken", images, self.path)
        self.stream_index = self._stream.index
        """Number of the stream with the picture."""
        self.is_dolby_vision = needs_dolby_vision(self._stream)
        """Whether its colors are those of Dolby Vision alone."""
        self._converter = Converter(source, first, self._ticks_s, self._rate)
        self.picture = self._picture(first, deinterlace)

    def __enter__(self) -> Video:
        """Return the open video."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file."""
        self._files.close()

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

    def what_is_cut_off(self) -> str | None:
        """How the file falls short of what its header promises, if the header tells; at any time."""
        return what_is_cut_off(self.path, self._container, self._stream)

    def has_many_frames(self) -> bool:
        """Whether there is a second frame; before the first is read."""
        with media_errors(self._what_fails):
            second = next(self._decoded, None)
        self._decoded = chain(() if second is None else (second,), self._decoded)
        return second is not None

    def frames(
        self, wanted: Range, known: Record = NOTHING, skip: int = 0, offset: int = 0, lead: int = 0
    ) -> Iterator[Frame]:
        """Decode the clip once, to its last frame, and convert those of a range.

        What comes before is decoded from the start, or where the file has an index and that gives the same
        frames, from the last key frame before it.

        Args:
            wanted: The range.
            known: Its frames from ``offset`` on, as they were when an earlier run decoded them.
            skip: Of these, how many to leave out; fewer than are known, or 0.
            offset: Frames of the range to leave out in any case.
            lead: Of those, how many at the end to give nevertheless, if none that is known is left out.

        Yields:
            Frames in display order, with strictly increasing times.
        """
        return guarded(self._wanted_frames(wanted, known, skip, offset, lead), self._what_fails)

    def _wanted_frames(
        self, wanted: Range, known: Record, skip: int, offset: int, lead: int
    ) -> Iterator[Frame]:
        first = self._first.pts
        assert first is not None
        found = offset + skip if skip else 0
        before = known.pts[skip - 1] if skip else None
        target = known.pts[skip] if skip else first + ceil(wanted.start_s / self.picture.time_base)
        for frame in self._frames_from(target, known, skip, offset):
            pts = frame.pts
            assert pts is not None
            if pts < target:
                continue
            since_start_s = (pts - first) * self.picture.time_base - wanted.start_s
            if found == wanted.frames or (
                wanted.duration_s is not None and since_start_s >= wanted.duration_s
            ):
                self._is_read_whole = False
                return
            found += 1
            self.last_duration = frame.duration or (self._nominal_ticks if before is None else pts - before)
            before = pts
            self._shown = (first, pts + self.last_duration)
            if found <= offset - lead:
                continue
            yield Frame(self._converter.image(frame), pts)
        if not found:
            raise UpscaleError(
                f"expected frames after {float(wanted.start_s):g} s, found the end of {self.path}"
            )

    def _frames_from(self, target: int, known: Record, skip: int, offset: int) -> Iterator[av.VideoFrame]:
        """Decoded frames, from some frame at or before a time on."""
        first = self._first.pts
        can_seek = self._deinterlace == OFF and not (self._source.is_pipe or self._source.is_stills)
        if first is None or target <= first or not can_seek:
            return chain([self._first], self._decoded)
        container = self._files.enter_context(self._source.open())
        stream = main_stream(container, self._selection)
        _use_threads(stream)
        found = seek(container, stream, first, target)
        if found is None or (offset and found.key_pts < known.pts[0]):  # what came before is not known
            return chain([self._first], self._decoded)
        counts = self._packets, self._frames, self._before_start, self.refused, self.damaged
        before = bisect_left(known.pts, found.key_pts) - 1
        damaged, refused = (known.damaged[before], known.refused[before]) if before >= 0 else (0, 0)
        frames = self._with_times(self._counted(found, damaged, refused))
        if skip:  # the first frame is known, and tells whether all is as it was
            start = next((frame for frame in frames if frame.pts is None or frame.pts >= target), None)
            if start is None or not known.has(skip, start.pts or 0, self._converter.image(start)):
                self._packets, self._frames, self._before_start, self.refused, self.damaged = counts
                return chain([self._first], self._decoded)
            frames = chain([start], frames)
        return frames

    def _counted(self, found: Seek, damaged: int, refused: int) -> Iterator[av.VideoFrame]:
        """Count what was met from a key frame on, and what was met before it."""
        self._before_start = 0

        def count() -> None:
            self._packets, self._frames = found.packets + refused, found.decoded
            self.refused, self.damaged = found.refused + refused, found.damaged + damaged

        for frame in found.frames:
            count()
            yield frame
        count()

    @property
    def _ticks_s(self) -> Fraction:
        """Seconds per tick of the times of frames."""
        return self._stream.time_base or 1 / self._rate

    @property
    def _rate(self) -> Fraction:
        rate = self._stream.guessed_rate or self._stream.average_rate or FALLBACK_RATE
        if max(rate.as_integer_ratio()) < LARGEST_RATE_TERM:
            return rate
        return rate.limit_denominator(1001) or FALLBACK_RATE  # 0: less than a frame in half an hour

    @property
    def _nominal_ticks(self) -> int:
        """How long a frame is shown that does not say."""
        return max(1, round(1 / (self._rate * self._ticks_s)))

    def _say_that_times_jump(self) -> None:
        if "times" not in self._told:
            self._told.add("times")
            log.warning(
                "times begin anew in %s, as of recordings put one after the other: they are counted on",
                self.path,
            )

    def _decode(self) -> Iterator[av.VideoFrame]:
        """Decode as FFmpeg does: what is broken is counted and left behind."""
        packets = packets_of(self._container, [self._stream], self._say_that_times_jump)
        early: list[int] = []  # times of the packets before the first frame
        first: int | None = None
        while True:
            try:
                packet = next(packets, None)
                if packet is None:
                    return
                if not packet.size and packet.dts is not None:
                    # The frame before once more, as Theora says it; FFmpeg's command skips it too.
                    self._repeated_until = packet.dts + (packet.duration or self._nominal_ticks)
                    continue
                if packet.size and not packet.is_discard:
                    self._packets += 1
                    self._packet_bytes = packet.size
                    if packet.pts is not None and first is None:
                        early.append(packet.pts)
                    elif packet.pts is not None and first is not None and packet.pts < first:
                        self._before_start += 1
                for frame in packet.decode():
                    if first is None and frame.pts is not None:
                        first = frame.pts
                        self._begin_at(first, early)
                    self._frames += 1
                    self.damaged += frame.is_corrupt
                    yield frame
            except UNDECODABLE:
                self.refused += 1

    def _begin_at(self, first: int, early: list[int]) -> None:
        """Say what lies before the first frame that can be decoded, as in a recording begun at any time."""
        lost = [pts for pts in early if pts < first]
        if lost:
            self._before_start = len(lost)
            self._lead_s = (first - min(lost)) * self._ticks_s
            log.warning(
                "%s begins in the middle of a group of pictures: the %d before its first key frame (%.2f s) "
                "cannot be decoded",
                self.path,
                len(lost),
                self._lead_s,
            )

    def _with_times(self, frames: Iterator[av.VideoFrame]) -> Iterator[av.VideoFrame]:
        """Give every frame a time in ``pts``, after the one before it in any case."""
        waiting: list[av.VideoFrame] = []  # without a time, at the beginning
        before: int | None = None
        shift = step = 0
        for frame in chain(frames, [None]):
            # Containers such as AVI give only decoding times, raw streams none at all.
            found = None if frame is None else frame.dts if frame.pts is None else frame.pts
            if before is None:
                waiting += [] if frame is None else [frame]
                if frame is not None and found is None and len(waiting) < MOST_WITHOUT_TIME:
                    continue
                steps = [self._ticks_of(one) for one in waiting]
                start = 0 if found is None else found - sum(steps[:-1])
                for one, step in zip(waiting, steps, strict=True):
                    one.pts = before = start
                    start += step
                    yield one
            elif frame is not None:
                if found is None:
                    found = before + step - shift
                elif found + shift < before - STEPS_BACK * self._nominal_ticks:
                    shift = before + step - found
                    self._say_that_times_jump()
                frame.pts = before = max(found + shift, before + 1)
                step = self._ticks_of(frame)
                yield frame

    def _ticks_of(self, frame: av.VideoFrame) -> int:
        """How long a frame is shown."""
        return frame.duration or self._nominal_ticks

    def what_is_missing(self) -> str | None:
        """After the last frame: how the file fell short of what it promised, if it did."""
        stream, picture = self._stream, self.picture
        if not self._is_read_whole:
            return None
        if self._container.format.name == Y4M_FORMAT:
            place = self._source.stdin if self._source.is_pipe else self._source.path
            if rest_of_frame(place, self._packets, self._packet_bytes):
                return f"ends in the middle of frame {self._packets + 1}"
        first, end = self._shown[0], max(self._shown[1], self._repeated_until)
        seconds = float((end - first) * picture.time_base + self._lead_s)
        is_end = self._container.format.name in DURATION_IS_END
        start_s = float(first * picture.time_base - self._lead_s)
        promised = _declared_duration_s(stream, start_s, is_end)
        # A file may promise samples that an edit list hides, so the count alone proves nothing.
        frame_s = max(1 / picture.rate, self.last_duration * picture.time_base)
        if promised - seconds > 1.5 * frame_s and self._packets < (stream.frames or inf):
            of_frames = f" of {stream.frames}" if stream.frames else ""
            return f"ends after {self._frames}{of_frames} frames, {seconds:.2f} s of {promised:.2f} s"
        if cut_off := self.what_is_cut_off():
            return cut_off
        lost = self._packets - self._before_start - self._frames
        if self.refused and lost > 0:
            return f"has {lost} frames that cannot be decoded"
        return None

    def _picture(self, first: av.VideoFrame, deinterlace: str) -> Picture:
        stream = self._stream
        # CMYK comes from the JPEG decoder in planes that are called RGB and alpha.
        is_jpeg = stream.codec_context.name == "mjpeg"
        has_alpha = not is_jpeg and any(component.is_alpha for component in first.format.components)
        if has_alpha or ALPHA in {(key.lower(), value) for key, value in stream.metadata.items()}:
            log.warning("transparency is left out")
        if first.interlaced_frame and deinterlace == OFF:
            log.warning(
                "interlaced frames are upscaled as they are: better deinterlace the clip first, with "
                "--deinterlace auto"
            )
        return Picture(
            size=self._converter.size,
            rate=self._rate,
            time_base=self._ticks_s,
            color=self._converter.color,
            sample_aspect_ratio=stream.sample_aspect_ratio or None,
            display_matrix=None
            if self._source.is_stills
            else display_matrix(first, stream.codec_context.name),
        )


def _use_threads(stream: VideoStream) -> None:
    stream.thread_type = "AUTO"
    stream.thread_count = DECODER_THREADS


def _declared_duration_s(stream: VideoStream, start_s: float, is_end: bool) -> float:
    """How long the picture is by what the file says of this stream; 0 where it says nothing."""
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base) - (max(0.0, start_s) if is_end else 0.0)
    clock = re.fullmatch(r"(\d+):(\d\d):(\d\d\.?\d*)", stream.metadata.get("DURATION", ""))  # Matroska
    hours, minutes, seconds = clock.groups() if clock else (0, 0, 0)
    # FFmpeg writes when the stream ends, which is how long it is only where it starts at zero.
    return float(hours) * 3600 + float(minutes) * 60 + float(seconds) - max(0.0, start_s)
