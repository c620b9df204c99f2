"""Which streams a file has: the one with the picture, covers, and what the muxer makes by itself."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import av
from av.container import InputContainer
from av.stream import Discard, Disposition, Stream
from av.video.stream import VideoStream

from ..errors import UpscaleError
from .source import file_url

NO_PICTURE = Disposition.attached_pic | Disposition.timed_thumbnails
DEFAULT_BONUS_PX = 5_000_000  # what FFmpeg's own choice adds for the default stream (ffmpeg_mux_init.c)

# The record that says of a stream that it is Dolby Vision, as Matroska's muxer writes it, and where in it
# the upper half of a byte says which ordinary format its picture can be shown as; 0: none.
DOLBY_VISION_RECORDS = (b"dvcC", b"dvvC", b"dvwC")
DOLBY_VISION_FALLBACK = slice(4, 5)
EXTRA_DATA_ELEMENT = b"\x41\xed"  # BlockAddIDExtraData


@dataclass(frozen=True)
class Selection:
    """Which of a file's streams are wanted."""

    only: frozenset[int] | None = None
    """Numbers of the streams to keep; None: all."""
    without: frozenset[int] = frozenset()
    """Numbers of streams to leave out."""
    audio: str = "copy"
    """``copy``, ``none``, or the codec to encode it with."""
    subtitles: bool = True
    """Whether subtitles are kept."""

    def has(self, stream: Stream) -> bool:
        """Whether a stream is wanted."""
        if stream.type == "audio" and self.audio == "none":
            return False
        if stream.type == "subtitle" and not self.subtitles:
            return False
        return stream.index not in self.without and (self.only is None or stream.index in self.only)

    def check(self, count: int, path: Path) -> None:
        """Refuse numbers of streams that are not there.

        Raises:
            UpscaleError: There is no such stream.
        """
        missing = sorted(((self.only or frozenset()) | self.without) - set(range(count)))
        if missing:
            raise UpscaleError(
                f"expected numbers of streams of {path} in --streams, 0 to {count - 1}, found {missing[0]}"
            )


EVERY_STREAM = Selection()


def main_stream(container: InputContainer, selection: Selection = EVERY_STREAM) -> VideoStream:
    """The stream with the picture, chosen as FFmpeg does: the largest, the default stream before others.

    Raises:
        StopIteration: There is no picture.
    """
    found = [s for s in container.streams.video if not s.disposition & NO_PICTURE and selection.has(s)]
    if not found:
        raise StopIteration
    return max(found, key=_score)  # the first of equal ones


def _score(stream: VideoStream) -> int:
    bonus = DEFAULT_BONUS_PX if stream.disposition & Disposition.default else 0
    context = stream.codec_context
    return bonus + (context.width * context.height if context else 0)


def count_frames(path: Path) -> int:
    """How many pictures a file of ours has, without decoding them."""
    with av.open(file_url(path)) as container:
        return sum(1 for packet in container.demux(main_stream(container)) if packet.size)


def is_cover(stream: Stream) -> bool:
    """Whether a stream is a cover image."""
    return stream.type == "video" and bool(stream.disposition & Disposition.attached_pic)


def is_made_by_muxer(stream: Stream) -> bool:
    """Whether the muxer makes such a stream anew: MP4's chapters from chapters, a timecode from its tag."""
    if stream.type != "data":
        return False
    is_unread = stream.name == "bin_data" and stream.discard == Discard.all
    return "timecode" in stream.metadata or (is_unread and bool(stream.container.chapters()))


def read_all(container: InputContainer) -> None:
    """Have FFmpeg read data streams that it would skip, as short ones of cameras, but for chapters."""
    for stream in container.streams:
        if stream.type == "data" and stream.discard == Discard.all and not is_made_by_muxer(stream):
            stream.discard = Discard.default


def describe(stream: Stream) -> str:
    """Number, type and codec of a stream, for messages."""
    codec = stream.codec_context.name if stream.codec_context else getattr(stream, "name", None)
    return f"stream {stream.index} ({stream.type} {codec or ''}".rstrip() + ")"


def needs_dolby_vision(stream: VideoStream) -> bool:
    """Whether only a Dolby Vision decoder shows the right colors, as with profile 5.

    PyAV does not tell of the record; but Matroska's muxer writes it into a header.
    """
    if stream.name not in ("hevc", "av1", "h264"):
        return False
    header = io.BytesIO()
    with av.open(header, "w", format="matroska") as scratch:
        scratch.add_stream_from_template(stream, opaque=True)
        scratch.start_encoding()
        found = header.getvalue()
    for name in DOLBY_VISION_RECORDS:
        place = found.find(name)
        start = found.find(EXTRA_DATA_ELEMENT, place) if place >= 0 else -1
        if start >= 0:
            record = found[start + len(EXTRA_DATA_ELEMENT) + 1 :]  # one byte of length: the record has 24
            return record[DOLBY_VISION_FALLBACK][0] >> 4 == 0
    return False
