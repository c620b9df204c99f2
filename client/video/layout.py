"""Which streams of a source an output has, and in which form: an open file with its header written."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from math import lcm
from pathlib import Path
from typing import cast

import av
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.stream import Stream
from av.subtitles.stream import SubtitleStream
from av.video.stream import VideoStream

from ..errors import UpscaleError
from .encode import tag_stream
from .matroska import ROOM
from .picture import Picture
from .source import Source, file_url
from .streams import Selection, is_cover, is_made_by_muxer, main_stream, read_all
from .times import Span
from .tracks import (
    ATTACH,
    AUDIO_CODECS,
    COPY,
    TEXT_SUBTITLES,
    Attached,
    ConvertedAudio,
    ConvertedSubtitles,
    Copied,
    Track,
    copy_of,
    cover_of,
)

# Containers that keep every frame's time, the tags of colors and the shape of pixels; they are rehearsed.
MP4_FAMILY = (".mp4", ".m4v", ".mov")
MATROSKA = (".mkv", ".webm")
SUFFIXES = (*MP4_FAMILY, *MATROSKA)

FINEST_TIME_SCALE = 1 << 30  # per second, of a movie: players keep it in 32 bits

# Facts about the source's own bytes, which would be wrong in another file.
CONTAINER_TAGS = ("encoder", "major_brand", "minor_version", "compatible_brands")
STALE_TAGS = frozenset((*CONTAINER_TAGS, "DURATION", "BPS", "NUMBER_OF_BYTES", "NUMBER_OF_FRAMES"))

SUBTITLES_BY_SUFFIX = {
    ".mp4": "mov_text",
    ".m4v": "mov_text",
    ".mov": "mov_text",
    ".mkv": "subrip",
    ".webm": "webvtt",
}
"""The form of text subtitles that each container holds in any case."""

Forms = Mapping[int, str]
"""Of each stream of the source that the output has, by its number: COPY, ATTACH or the codec it is given."""


def check_suffix(out: Path) -> None:
    """Refuse an output whose container cannot keep what is promised.

    Raises:
        UpscaleError: It is refused.
    """
    if out.suffix.lower() not in SUFFIXES:
        raise UpscaleError(
            f"expected a file name such as out.mp4 or out.mkv, found {out.suffix or 'no suffix'}: video is "
            f"written to {', '.join(SUFFIXES)}; `ffmpeg -i out.mkv -c copy` makes other files of it"
        )


class Layout:
    """An output and its source, both open, the header written.

    Args:
        files: Closes both.
        source: Where everything but the picture comes from.
        segment: A segment of the picture.
        out: The file to write; its suffix names the container.
        picture: What it is like.
        selection: Which streams of the source are wanted.
        forms: Which of them the output has, and how.
        span: What part of the source.
    """

    def __init__(
        self,
        files: ExitStack,
        source: Source,
        segment: Path,
        out: Path,
        picture: Picture,
        selection: Selection,
        forms: Forms,
        span: Span,
    ) -> None:
        self.source = files.enter_context(source.open())
        read_all(self.source)
        first = files.enter_context(av.open(file_url(segment)))
        self.out = files.enter_context(
            av.open(file_url(out), "w", container_options=_options(out, picture, self.source))
        )
        main = main_stream(self.source, selection)
        self.tracks: dict[int, Track] = {}
        """By the number of the stream in the source."""
        template = first.streams.video[0]
        for stream in in_order(self.source, selection, forms):
            if stream is main:
                self.picture_stream = cast(VideoStream, copy_of(self.out, template, template))
                _dress(self.picture_stream, stream)
                self.title = stream.metadata.get("title", "")
                if writes_aspect(out, picture):
                    self.picture_stream.metadata["title"] = self.title + ROOM
                self._describe_picture(picture)
            else:
                self.tracks[stream.index] = self._track(source, stream, template, forms[stream.index])
                _dress(self.tracks[stream.index].stream, stream)
        self.out.metadata.update({k: v for k, v in self.source.metadata.items() if k not in STALE_TAGS})
        self.out.set_chapters(span.chapters(self.source))
        self.out.start_encoding()

    def _describe_picture(self, picture: Picture) -> None:
        stream = self.picture_stream
        stream.time_base = picture.time_base
        tag_stream(stream, picture)  # NUT, where FFV1's segments lie, keeps no tags
        stream.set_display_matrix(picture.display_matrix)
        if self.out.format.name in ("mp4", "mov", "ipod") and stream.name == "hevc":
            stream.codec_context.codec_tag = "hvc1"  # Apple's players know no other

    def _track(self, source: Source, stream: Stream, template: Stream, form: str) -> Track:
        if form == COPY:
            return Copied(self.out, stream, template)
        if form == ATTACH:
            with source.open() as again:
                return Attached(self.out, stream, cover_of(again, again.streams.video[_nth(stream)]))
        if form in AUDIO_CODECS:
            return ConvertedAudio(self.out, cast(AudioStream, stream), form)
        return ConvertedSubtitles(self.out, cast(SubtitleStream, stream), form)


def writes_aspect(out: Path, picture: Picture) -> bool:
    """Whether the shape of pixels is written into the file when it is finished."""
    return out.suffix.lower() in MATROSKA and picture.sample_aspect_ratio is not None


def in_order(container: InputContainer, selection: Selection, forms: Forms) -> list[Stream]:
    """The streams of a source that the output has, in the output's order.

    Covers and attachments come last: containers have them in places of their own.
    """
    main = main_stream(container, selection)
    kept = [stream for stream in container.streams if stream is main or stream.index in forms]
    return sorted(kept, key=lambda stream: is_cover(stream) or stream.type == "attachment")


def candidates(stream: Stream, out: Path, selection: Selection) -> list[str]:
    """Forms in which an output may hold a stream, the best first; none: it is left to the muxer, or out."""
    suffix = out.suffix.lower()
    if is_cover(stream):
        return [ATTACH] if suffix == ".mkv" else [COPY]
    if stream.type == "video" or is_made_by_muxer(stream):
        return []
    if stream.type == "audio":
        return [selection.audio]
    if stream.type == "subtitle" and stream.codec_context is not None:
        is_text = stream.codec_context.name in TEXT_SUBTITLES
        other = SUBTITLES_BY_SUFFIX[suffix]
        return [COPY, other] if is_text and stream.codec_context.name != other else [COPY]
    return [COPY] if stream.type in ("subtitle", "attachment", "data") else []


def _nth(stream: Stream) -> int:
    """Which of the video streams of its container a stream is."""
    videos = [one for one in stream.container.streams if one.type == "video"]
    return videos.index(stream)


def _dress(copy: Stream, original: Stream) -> None:
    """Give a stream of the output the tags of its original."""
    copy.metadata.update({key: value for key, value in original.metadata.items() if key not in STALE_TAGS})
    if copy.type != "attachment":
        copy.disposition = original.disposition


def _options(out: Path, picture: Picture, source: InputContainer) -> dict[str, str]:
    if out.suffix.lower() in MP4_FAMILY:
        # A stream that starts late is written as a pause in the movie's time scale: milliseconds
        # unless told otherwise, and the start would be rounded.
        scale = picture.time_base.denominator
        for stream in source.streams.audio:
            finer = lcm(scale, stream.codec_context.sample_rate if stream.codec_context else 1)
            scale = finer if 0 < finer <= FINEST_TIME_SCALE else scale
        return {"movflags": "+faststart", "movie_timescale": str(scale)}
    # Audio that starts before zero, as AAC's priming does, would shift everything.
    return {"avoid_negative_ts": "disabled"}
