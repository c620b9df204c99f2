"""Segments and the source file in, the finished file out: every stream, every time, verified."""

from __future__ import annotations

import heapq
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import av
from av.container import InputContainer, OutputContainer
from av.packet import Packet
from av.stream import Disposition, Stream
from av.video.stream import VideoStream

from ..errors import UpscaleError
from .decode import Picture, main_stream
from .encode import tag_stream
from .source import Source
from .times import EVERYTHING, Span, Times

AnyStream = TypeVar("AnyStream", bound=Stream)

log = logging.getLogger(__name__)

# Facts about the source's own bytes, which would be wrong in another file.
CONTAINER_TAGS = ("encoder", "major_brand", "minor_version", "compatible_brands")
STALE_TAGS = frozenset((*CONTAINER_TAGS, "DURATION", "BPS", "NUMBER_OF_BYTES", "NUMBER_OF_FRAMES"))
QUICKTIME_FAMILY = frozenset(("mp4", "mov", "ipod"))


class Muxer:
    """One join of segments with the other streams of their source.

    Args:
        out: The file to write; its suffix names the container.
        source: Where audio, subtitles, attachments, chapters and tags come from.
        picture: Of the hr clip.
    """

    def __init__(self, out: Path, source: Source, picture: Picture) -> None:
        self._out, self._source, self._picture = out, source, picture
        self._told: set[int] = set()

    def rehearse(self, segment: Path) -> None:
        """Write the header alone, with a segment of one frame, to learn early what the container refuses."""
        with ExitStack() as files:
            self._lay_out(files, segment, EVERYTHING)
        self._out.unlink(missing_ok=True)

    def write(self, segments: Sequence[Path], times: Times, is_whole: bool) -> None:
        """Write the whole file and verify it.

        Args:
            segments: All of them, in order.
            times: When their frames are shown in the source.
            is_whole: They are all of the source; otherwise the output begins at zero, and of the other
                streams only what belongs to these frames is copied.

        Raises:
            UpscaleError: What was written is not what should be there.
        """
        span = EVERYTHING
        if not is_whole:
            span = Span(times.pts[0] * times.time_base, times.end * times.time_base)
            times = replace(times, pts=[pts - times.pts[0] for pts in times.pts])
        with ExitStack() as files:
            source, out, picture_stream, copies = self._lay_out(files, segments[0], span)
            packets = heapq.merge(
                _copied(source, copies, span),
                self._picture_packets(segments, times, picture_stream),
                key=_decoding_time_s,
            )
            for packet in packets:
                out.mux(packet)
        self._verify(segments[0], times, span)

    def _lay_out(
        self, files: ExitStack, segment: Path, span: Span
    ) -> tuple[InputContainer, OutputContainer, VideoStream, dict[int, Stream]]:
        """Open the files and write the header; copies maps a source stream's index to its copy."""
        source = files.enter_context(self._reopened(segment))
        first = files.enter_context(av.open(segment))
        try:
            out = files.enter_context(av.open(self._out, "w", container_options=self._container_options()))
        except ValueError as err:
            raise UpscaleError(
                f"expected a file name such as out.mp4 or out.mkv, found {self._out.suffix or 'no suffix'}"
            ) from err
        main = main_stream(source)
        copies: dict[int, Stream] = {}
        picture_stream = None
        for stream in source.streams:
            if stream is main:
                picture_stream = self._add(out, first.streams.video[0], stream)
                picture_stream.time_base = self._picture.time_base
                tag_stream(picture_stream, self._picture)  # NUT, where FFV1's segments lie, keeps no tags
                picture_stream.set_display_matrix(self._picture.display_matrix)
                if out.format.name in QUICKTIME_FAMILY and picture_stream.name == "hevc":
                    picture_stream.codec_context.codec_tag = "hvc1"  # Apple's players know no other
            elif _is_copied(stream):
                copies[stream.index] = self._add(out, stream, stream)
            elif not _is_rewritten(stream) and stream.index not in self._told:
                self._told.add(stream.index)
                log.warning(
                    "left out stream %d (%s)", stream.index, f"{stream.type} {stream.name or ''}".strip()
                )
        assert picture_stream is not None
        out.metadata.update({k: v for k, v in source.metadata.items() if k not in STALE_TAGS})
        out.set_chapters(span.chapters(source))
        try:
            out.start_encoding()
        except av.FFmpegError as err:
            names = ", ".join(f"{stream.type} {stream.name}" for stream in out.streams)
            raise UpscaleError(
                f"{self._out.suffix} files cannot hold all of {names} ({err.strerror}): name the output .mkv"
            ) from err
        return source, out, picture_stream, copies

    def _reopened(self, segment: Path) -> InputContainer:
        """The source once more; a pipe is gone, and had no more in it than a segment has."""
        return (Source(segment) if self._source.is_pipe else self._source).open()

    def _container_options(self) -> dict[str, str]:
        suffix = self._out.suffix.lower()
        if suffix in (".mp4", ".mov", ".m4v"):
            # A picture that starts late is written as a pause in the movie's time scale: milliseconds
            # unless told otherwise, and the start would be rounded.
            return {"movflags": "+faststart", "movie_timescale": str(self._picture.time_base.denominator)}
        if suffix in (".mkv", ".webm"):
            # Audio that starts before zero, as AAC's priming does, would shift everything.
            return {"avoid_negative_ts": "disabled"}
        return {}

    def _add(self, out: OutputContainer, template: AnyStream, original: Stream) -> AnyStream:
        try:
            copy = out.add_stream_from_template(template, opaque=True)
        except ValueError as err:
            what = (
                f"stream {original.index} of {self._source.path} ({original.type}, {template.name})"
                if template is original
                else f"{template.name} pictures"
            )
            raise UpscaleError(
                f"{self._out.suffix} files cannot hold {what}: name the output .mkv, which holds all"
            ) from err
        copy.metadata.update({k: v for k, v in original.metadata.items() if k not in STALE_TAGS})
        copy.disposition = original.disposition
        return copy

    def _picture_packets(
        self, segments: Sequence[Path], times: Times, out_stream: VideoStream
    ) -> Iterator[Packet[Any]]:
        """Packets of all segments in a row, with the times of the clip."""
        start = 0
        for path in segments:
            with av.open(path) as segment:
                stream = segment.streams.video[0]
                ticks = 1 / (self._picture.rate * (stream.time_base or 1))  # per frame
                count = 0
                for packet in segment.demux(stream):
                    if packet.pts is None or packet.dts is None:
                        continue  # the end, as PyAV tells it
                    shown, decoded = start + round(packet.pts / ticks), start + round(packet.dts / ticks)
                    packet.stream = out_stream
                    packet.time_base = times.time_base
                    packet.pts, packet.dts = times.at(shown), times.at(decoded)
                    packet.duration = times.duration(shown)
                    count += 1
                    yield packet
            start += count

    def _verify(self, segment: Path, times: Times, span: Span) -> None:
        """Read the written file back and compare: streams, what is in them, frame times, chapters, shape."""

        def expect(what: str, expected: object, found: object) -> None:
            if expected != found:
                raise UpscaleError(f"{self._out} is not right: expected {what} {expected}, found {found}")

        with av.open(self._out) as out, self._reopened(segment) as source:
            old, new = main_stream(source), main_stream(out)
            kept = [stream.type for stream in source.streams if stream is old or _is_copied(stream)]
            expect("streams", kept, [s.type for s in out.streams if s is new or _is_copied(s)])
            expect("chapters", len(span.chapters(source)), len(out.chapters()))
            aspect = self._picture.sample_aspect_ratio
            expect("sample aspect ratio", aspect or 1, new.sample_aspect_ratio or 1)
            shown = sorted(packet.pts for packet in out.demux(new) if packet.size and packet.pts is not None)
            expect("frames", len(times.pts), len(shown))
            for index, (pts, frame) in enumerate(zip(shown, times.pts, strict=True)):
                assert new.time_base is not None
                if abs(pts * new.time_base - frame * times.time_base) > new.time_base / 2:
                    expect(f"time of frame {index + 1}", frame * times.time_base, pts * new.time_base)
        with av.open(self._out) as out, self._reopened(segment) as source:
            expect("packets per stream", _contents(source, span), _contents(out, EVERYTHING))


def _contents(container: InputContainer, span: Span) -> list[tuple[str, int]]:
    """How much is in every copied stream: packets, or bytes of PCM, which is cut into packets at will."""
    streams = [stream for stream in container.streams if _is_copied(stream) and stream.type != "attachment"]
    found = {stream.index: 0 for stream in streams}
    for packet in container.demux(streams) if streams else ():
        if packet.size and not _is_gap(packet) and span.has(packet):
            is_pcm = (packet.stream.name or "").startswith("pcm_")
            found[packet.stream.index] += packet.size if is_pcm else 1
    return [(stream.type, found[stream.index]) for stream in streams]


def _is_gap(packet: Packet[Any]) -> bool:
    """Whether a packet says that no subtitle is shown; MP4's muxer writes these by itself."""
    return packet.stream.name == "mov_text" and bytes(packet) == b"\0\0"


def _is_copied(stream: Stream) -> bool:
    if stream.type == "video":
        return bool(stream.disposition & Disposition.attached_pic)
    return stream.type in ("audio", "subtitle", "attachment")


def _is_rewritten(stream: Stream) -> bool:
    """Whether the muxer makes such a stream anew: MP4's chapters from chapters, a timecode from its tag."""
    return stream.name == "bin_data" or (stream.type == "data" and "timecode" in stream.metadata)


def _copied(source: InputContainer, copies: dict[int, Stream], span: Span) -> Iterator[Packet[Any]]:
    streams = [source.streams[index] for index in copies if source.streams[index].type != "attachment"]
    for packet in source.demux(streams) if streams else ():
        if packet.size and not _is_gap(packet) and span.has(packet):  # of size 0 at the end, as PyAV tells it
            if packet.dts is None:
                packet.dts = packet.pts
            span.shift(packet)
            packet.stream = copies[packet.stream.index]
            yield packet


def _decoding_time_s(packet: Packet[Any]) -> float:
    return float((packet.dts or 0) * packet.time_base)
