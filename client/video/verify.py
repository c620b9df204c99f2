"""Read a written file back and compare it with what should be in it."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
from av.container import InputContainer
from av.packet import Packet
from av.stream import Stream

from ..errors import UpscaleError
from .clock import packets_of
from .layout import Forms, in_order
from .picture import Picture
from .source import Source, file_url
from .streams import Selection, describe, is_cover, is_made_by_muxer, main_stream, read_all
from .times import EVERYTHING, Span, Times
from .tracks import AUDIO_CODECS

ALLOWED_SAMPLES = 4608 + 4096  # between source and encoded audio at either end: a frame of each, the longest

Contents = dict[int, int]
"""How much of each stream: packets, or bytes of PCM, which is cut into packets at will."""


def amount_of(packet: Packet[Any]) -> int:
    """What a packet counts for."""
    context = packet.stream.codec_context
    return packet.size if context is not None and context.name.startswith("pcm_") else 1


def is_pause(packet: Packet[Any]) -> bool:
    """Whether a packet says that no subtitle is shown; MP4's muxer writes these by itself."""
    context = packet.stream.codec_context
    return context is not None and context.name == "mov_text" and bytes(packet) == b"\0\0"


def can_decode(stream: Stream) -> bool:
    """Whether a stream is audio whose decoder opens with what the container says of it."""
    if stream.type != "audio" or stream.codec_context is None:
        return False
    try:
        stream.codec_context.open(strict=False)
    except (av.FFmpegError, ValueError):
        return False
    return True


def contents_of(container: InputContainer, forms: Forms, span: Span) -> Contents:
    """Count what an output takes from a source."""
    kept = [stream for stream in container.streams if stream.index in forms]
    return _count(container, [stream for stream in kept if stream.type != "attachment"], span)


def verify_encoded_audio(path: Path, source: Source, selection: Selection, forms: Forms, span: Span) -> None:
    """Compare when encoded audio begins and ends with the source's.

    Raises:
        UpscaleError: It does not where it should.
    """
    with av.open(file_url(path), metadata_errors="replace") as out, source.open() as old:
        sounds = [stream for stream in in_order(old, selection, forms) if stream.type == "audio"]
        before, after = _extents_s(old, sounds, span), _extents_s(out, out.streams.audio, EVERYTHING)
        rates = [getattr(stream.codec_context, "sample_rate", 0) or 1 for stream in sounds]
        encoded = [forms[stream.index] in AUDIO_CODECS for stream in sounds]
    for expected, found, rate, is_encoded in zip(before, after, rates, encoded, strict=True):
        distance_s = max(abs(a - b) for a, b in zip(expected, found, strict=True))
        if is_encoded and distance_s > Fraction(ALLOWED_SAMPLES, rate):
            times = [f"{float(start_s):.2f} to {float(end_s):.2f} s" for start_s, end_s in (expected, found)]
            raise UpscaleError(f"{path} is not right: expected audio from {times[0]}, found {times[1]}")


def _extents_s(
    container: InputContainer, streams: Sequence[Stream], span: Span
) -> list[tuple[Fraction, Fraction]]:
    """When the packets of each stream begin and end, on the output's clock."""
    found: dict[int, tuple[Fraction, Fraction]] = {}
    for packet in packets_of(container, streams):
        if packet.size and packet.pts is not None and span.has(packet):
            span.shift(packet)
            start_s = packet.pts * packet.time_base
            end_s = start_s + (packet.duration or 0) * packet.time_base
            found[packet.stream_index] = (found.get(packet.stream_index, (start_s, end_s))[0], end_s)
    return [found.get(stream.index, (Fraction(0), Fraction(0))) for stream in streams]


def _count(container: InputContainer, streams: list[Stream], span: Span) -> Contents:
    found = {stream.index: 0 for stream in streams}
    for packet in packets_of(container, streams):
        if packet.size and not is_pause(packet) and span.has(packet):
            found[packet.stream_index] += amount_of(packet)
    return found


def verify(
    path: Path,
    source: Source,
    picture: Picture,
    selection: Selection,
    forms: Forms,
    times: Times,
    span: Span,
    contents: Contents,
) -> None:
    """Compare a written file: streams, what is in them, frame times, chapters, shape of pixels.

    Audio that can be decoded from the source must be so from the file: muxers write what no demuxer reads.

    Args:
        path: The file.
        source: Where everything but the picture comes from.
        picture: What it should be like.
        selection: Which of the source's streams are wanted.
        forms: Which of them the file has, and how.
        times: Of its frames.
        span: What part of the source it has.
        contents: How much of each stream of the source it has.

    Raises:
        UpscaleError: Something is not as it should be.
    """

    def expect(what: str, expected: object, found: object) -> None:
        if expected != found:
            raise UpscaleError(f"{path} is not right: expected {what} {expected}, found {found}")

    with av.open(file_url(path), metadata_errors="replace") as out, source.open() as old:
        main, new = main_stream(old, selection), main_stream(out)
        kept = in_order(old, selection, forms)
        has_data = any(stream.type == "data" for stream in kept)
        there = [s for s in out.streams if s.type != "data" or (has_data and not is_made_by_muxer(s))]
        expect("streams", [stream.type for stream in kept], [stream.type for stream in there])
        expect("chapters", len(span.chapters(old)), len(out.chapters()))
        expect("sample aspect ratio", picture.sample_aspect_ratio or 1, new.sample_aspect_ratio or 1)
        shown = sorted(packet.pts for packet in out.demux(new) if packet.size and packet.pts is not None)
        expect("frames", len(times.pts), len(shown))
        for index, (pts, frame) in enumerate(zip(shown, times.pts, strict=True)):
            assert new.time_base is not None
            if abs(pts * new.time_base - frame * times.time_base) > new.time_base / 2:
                expect(f"time of frame {index + 1}", frame * times.time_base, pts * new.time_base)
        for one, written in zip(kept, there, strict=True):
            if can_decode(one) and not can_decode(written):
                expect("sound that can be decoded as", describe(one), "one that cannot")
        copies = {
            one.index: copy.index
            for one, copy in zip(kept, there, strict=True)
            if one is not main and one.type != "attachment" and not is_cover(one)
        }
    with av.open(file_url(path), metadata_errors="replace") as out:
        read_all(out)
        found = _count(out, [out.streams[copy] for copy in copies.values()], EVERYTHING)
    for index, copy in copies.items():
        if forms[index] not in AUDIO_CODECS:
            expect(f"packets of stream {copy}", contents[index], found[copy])
