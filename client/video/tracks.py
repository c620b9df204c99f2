"""One stream of the source on its way into the output: copied as it is, attached, or converted."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, Protocol, cast

import av
from av.audio.stream import AudioStream
from av.bitstream import BitStreamFilterContext
from av.container import InputContainer, OutputContainer
from av.error import BlockingIOError as NotYet
from av.error import EOFError as Ended
from av.filter import Graph
from av.packet import Packet
from av.stream import Stream
from av.subtitles.stream import SubtitleStream
from av.video.stream import VideoStream

from .boundary import UNDECODABLE

log = logging.getLogger(__name__)

COPY, ATTACH = "copy", "attach"
AUDIO_CODECS = frozenset(("aac", "flac"))
TEXT_SUBTITLES = frozenset(("ass", "mov_text", "ssa", "subrip", "srt", "text", "webvtt"))

MILLISECOND = Fraction(1, 1000)
LAYOUTS = {1: "mono", 2: "stereo", 3: "2.1", 4: "4.0", 5: "5.0", 6: "5.1", 7: "6.1", 8: "7.1"}  # as FFmpeg
SAMPLE_BITS_OF_16 = frozenset(("u8", "u8p", "s16", "s16p"))


class Track(Protocol):
    """A stream of the output and how packets of the source become its own."""

    @property
    def stream(self) -> Stream:
        """Of the output."""

    def packets(self, packet: Packet[Any]) -> Iterator[Packet[Any]]:
        """What a packet of the source becomes."""

    def rest(self) -> Iterator[Packet[Any]]:
        """What is left at the end."""


class Copied:
    """The same packets again."""

    def __init__(self, out: OutputContainer, source: Stream, picture: Stream) -> None:
        self.stream = copy_of(out, source, picture)

    def packets(self, packet: Packet[Any]) -> Iterator[Packet[Any]]:
        """The packet itself."""
        packet.stream = self.stream
        yield packet

    def rest(self) -> Iterator[Packet[Any]]:
        """Nothing."""
        return iter(())


class Attached:
    """A cover image as Matroska has it: a file in the file, written with the header."""

    def __init__(self, out: OutputContainer, source: Stream, image: bytes) -> None:
        kind = {"mjpeg": "jpeg"}.get(source.codec_context.name, source.codec_context.name)
        name = source.metadata.get("filename") or f"cover.{kind.replace('jpeg', 'jpg')}"
        self.stream = out.add_attachment(name, source.metadata.get("mimetype") or f"image/{kind}", image)

    def packets(self, packet: Packet[Any]) -> Iterator[Packet[Any]]:
        """Nothing: the header holds it."""
        return iter(())

    def rest(self) -> Iterator[Packet[Any]]:
        """Nothing."""
        return iter(())


class ConvertedSubtitles:
    """Text subtitles in another container's form."""

    def __init__(self, out: OutputContainer, source: SubtitleStream, codec: str) -> None:
        self._decoder = source.codec_context
        self.stream = cast(SubtitleStream, out.add_stream(codec))
        tick = source.time_base or MILLISECOND
        self.stream.codec_context.time_base = self.stream.time_base = tick
        # The encoder is opened with the header, before the decoder has made it from the stream's own.
        self.stream.codec_context.subtitle_header = self._decoder.subtitle_header or ASS_HEADER

    def packets(self, packet: Packet[Any]) -> Iterator[Packet[Any]]:
        """The same text from the same time on, as long; nothing for a pause."""
        shown = self._decoder.decode2(packet)
        if shown is None or not len(shown.rects):
            return
        text = self.stream.codec_context.encode_subtitle(shown)
        text.time_base, text.pts, text.dts = packet.time_base, packet.pts, packet.pts
        text.duration, text.stream = packet.duration, self.stream
        yield text

    def rest(self) -> Iterator[Packet[Any]]:
        """Nothing."""
        return iter(())


class ConvertedAudio:
    """Audio encoded anew, in step with its own times: pauses are filled with silence."""

    def __init__(self, out: OutputContainer, source: AudioStream, codec: str) -> None:
        self._source = source
        self.stream = cast(AudioStream, out.add_stream(codec, rate=source.codec_context.sample_rate))
        self.stream.codec_context.layout = layout_of(source)
        if codec == "flac" and source.codec_context.format.name not in SAMPLE_BITS_OF_16:
            self.stream.codec_context.format = "s32"
        self.stream.codec_context.time_base = Fraction(1, source.codec_context.sample_rate)
        self._graph: Graph | None = None

    def packets(self, packet: Packet[Any]) -> Iterator[Packet[Any]]:
        """Decode and encode; the encoder is some frames behind."""
        try:
            frames = self._source.decode(packet)
        except UNDECODABLE:
            log.warning("a packet of audio stream %d cannot be decoded", self._source.index)
            return
        for frame in frames:
            if self._graph is None:
                self._graph = self._even_times(frame)
            yield from self._encoded(frame)

    def rest(self) -> Iterator[Packet[Any]]:
        """What decoder and encoder hold back."""
        for frame in self._source.decode(None):
            yield from self._encoded(frame)
        if self._graph:
            yield from self._encoded(None)
            yield from self.stream.encode(None)

    def _even_times(self, frame: av.AudioFrame) -> Graph:
        graph = Graph()
        context = self._source.codec_context
        source = graph.add_abuffer(
            sample_rate=frame.sample_rate,
            format=frame.format.name,
            layout=layout_of(self._source),
            time_base=self._source.time_base,
        )
        graph.link_nodes(
            source, graph.add("aresample", f"{context.sample_rate}:async=1"), graph.add("abuffersink")
        ).configure()
        return graph

    def _encoded(self, frame: av.AudioFrame | None) -> Iterator[Packet[Any]]:
        assert self._graph is not None
        self._graph.push(frame)
        while True:
            try:
                even = cast(av.AudioFrame, self._graph.pull())
            except (NotYet, Ended):
                return
            yield from self.stream.encode(even)


ASS_HEADER = (
    b"[Script Info]\nScriptType: v4.00+\nPlayResX: 384\nPlayResY: 288\n\n[V4+ Styles]\nFormat: Name, "
    b"Fontname, Fontsize, PrimaryColour, SecondaryColour, OutlineColour, BackColour, Bold, Italic, "
    b"Underline, StrikeOut, ScaleX, ScaleY, Spacing, Angle, BorderStyle, Outline, Shadow, Alignment, "
    b"MarginL, MarginR, MarginV, Encoding\n"
    b"Style: Default,Arial,16,&Hffffff,&Hffffff,&H0,&H0,0,0,0,0,100,100,0,0,1,1,0,2,10,10,10,1\n\n"
    b"[Events]\nFormat: Layer, Start, End, Style, Name, MarginL, MarginR, MarginV, Effect, Text\n"
)
"""FFmpeg's own for subtitles without styles."""


def copy_of(out: OutputContainer, source: Stream, picture: Stream) -> Stream:
    """Add a stream with all parameters of another to a container, as ``ffmpeg -c copy`` does.

    PyAV refuses codecs that the container holds only by an older convention (WMA or A-law in Matroska) and
    those that this FFmpeg cannot decode. So the stream is made from the picture's, which the container
    takes, and then given the other's parameters.
    """
    if source.codec_context is None and source.type in ("data", "attachment"):
        copy = out.add_stream_from_template(source)
    else:
        try:
            copy = out.add_stream_from_template(source, opaque=True)
            if isinstance(copy, AudioStream) and isinstance(source, AudioStream):
                copy.codec_context.layout = layout_of(source)  # old containers count channels only
        except ValueError:
            copy = out.add_stream_from_template(picture, opaque=True)
            BitStreamFilterContext("null", source, copy)
            copy.time_base = source.time_base
            copy.codec_context.codec_tag = "\0\0\0\0"
    return copy


def layout_of(stream: AudioStream) -> str:
    """The channels of a stream, where it only counts them in FFmpeg's usual order."""
    layout = stream.codec_context.layout
    known = {name: count for count, name in LAYOUTS.items()}
    if layout.name in known or not layout.name.endswith("channels"):
        return layout.name
    return LAYOUTS.get(layout.nb_channels, layout.name)


def cover_of(container: InputContainer, stream: VideoStream) -> bytes:
    """The image of a cover stream; empty if the file ends before it."""
    return next((bytes(packet) for packet in container.demux(stream) if packet.size), b"")
