"""Segments and the source file in, the finished file out: every stream, every time, verified."""

from __future__ import annotations

import errno
import heapq
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import av
from av.packet import Packet
from av.stream import Stream
from av.video.stream import VideoStream

from ..errors import UpscaleError
from ..stages import reason_of
from .clock import MAY_REPEAT, packets_of
from .layout import MP4_FAMILY, Forms, Layout, candidates, check_suffix, writes_aspect
from .matroska import set_aspect
from .picture import Picture
from .source import Source, file_url
from .streams import (
    EVERY_STREAM,
    Selection,
    count_frames,
    describe,
    is_cover,
    is_made_by_muxer,
    main_stream,
    read_all,
)
from .times import EVERYTHING, Span, Times
from .tracks import AUDIO_CODECS, COPY
from .verify import Contents, amount_of, contents_of, is_pause, verify, verify_encoded_audio

log = logging.getLogger(__name__)

REHEARSED_PACKETS = 1000  # of the source, at most, that a rehearsal reads
OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.ENOENT)
CURE_OF_AUDIO = "pass --audio aac, --audio flac or --audio none, or leave it out with --streams"


class Muxer:
    """One join of segments with the other streams of their source.

    Args:
        out: The file to write; its suffix names the container.
        source: Where audio, subtitles, attachments, chapters and tags come from.
        picture: Of the hr clip.
        selection: Which of the source's streams are wanted.
    """

    def __init__(
        self, out: Path, source: Source, picture: Picture, selection: Selection = EVERY_STREAM
    ) -> None:
        self._out, self._source, self._picture, self._selection = out, source, picture, selection
        self._decided: dict[int, str] | None = None
        self._told: set[int] = set()

    def rehearse(self, segment: Path) -> None:
        """Write and verify a small file, with a segment of few frames and each stream's first packets.

        Raises:
            UpscaleError: The container cannot hold what it should; the text names a choice that works.
        """
        check_suffix(self._out)
        self._forms(segment)
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
        forms = self._forms(segments[0])
        start_s = times.pts[0] * times.time_base
        span = EVERYTHING
        if not is_whole:
            span = Span(start_s, times.end * times.time_base, start_s)
        elif start_s < 0:  # players do not show what comes before zero
            span = Span(None, None, start_s)
        if span.origin_s:
            times = replace(times, pts=[pts - times.pts[0] for pts in times.pts])
        with self._opened(segments[0]).open() as container:
            read_all(container)
            contents = contents_of(container, forms, span)
        forms = self._not_empty(segments[0], forms, contents, is_whole)
        self._write(segments, times, forms, span)
        contents = {index: found for index, found in contents.items() if index in forms}
        source = self._opened(segments[0])
        verify(self._out, source, self._picture, self._selection, forms, times, span, contents)
        if AUDIO_CODECS & set(forms.values()):
            verify_encoded_audio(self._out, source, self._selection, forms, span)

    def _opened(self, segment: Path) -> Source:
        """The source once more; a pipe is gone, and had no more in it than a segment has."""
        return Source(segment) if self._source.is_pipe else self._source

    # Which streams, and how

    def _forms(self, segment: Path) -> Forms:
        """Decide on every stream of the source, by trying; what is left out or refused is said."""
        if self._decided is not None:
            return self._decided
        wanted = {}
        with self._opened(segment).open() as source:
            selection = Selection() if self._source.is_pipe else self._selection
            main = main_stream(source, selection)
            for stream in source.streams:
                if stream is main or not selection.has(stream) or is_made_by_muxer(stream):
                    continue
                choices = candidates(stream, self._out, selection)
                if choices:
                    wanted[stream.index] = choices
                else:
                    self._leave_out(stream)
            self._try_picture(segment)
            best = {index: choices[0] for index, choices in wanted.items()}
            if best and self._failure(segment, best):
                best = {}
                for index, choices in wanted.items():
                    form = self._first_that_works(segment, source.streams[index], choices)
                    if form:
                        best[index] = form
                if failure := self._failure(segment, best):
                    raise UpscaleError(
                        f"{self._out.suffix} files cannot hold all streams of {self._source.path} together "
                        f"({failure}): name the output .mkv, or leave some out with --streams"
                    )
        self._decided = best
        return best

    def _try_picture(self, segment: Path) -> None:
        failure = self._failure(segment, {})
        if failure:
            with av.open(file_url(segment)) as container:
                codec = container.streams.video[0].name
            what = f"{self._out.suffix} files cannot hold {codec} pictures"
            if self._out.suffix.lower() == ".mkv":
                raise UpscaleError(f"{what} like these ({failure}): choose another --codec")
            raise UpscaleError(f"{what}: name the output .mkv, which holds all ({failure})")

    def _first_that_works(self, segment: Path, stream: Stream, choices: Sequence[str]) -> str | None:
        """The form in which the container holds a stream; None: in none, which is said.

        Raises:
            UpscaleError: The stream would be missed, and another choice can keep it.
        """
        failure = ""
        for form in choices:
            failure = self._failure(segment, {stream.index: form})
            if not failure:
                if form != choices[0]:
                    log.warning("%s is converted to %s, styles may change", describe(stream), form)
                return form
        what = f"{self._out.suffix} files cannot hold {describe(stream)} of {self._source.path} ({failure})"
        if stream.type == "audio":
            other = "" if self._out.suffix.lower() == ".mkv" else "name the output .mkv, or "
            raise UpscaleError(f"{what}: {other}{CURE_OF_AUDIO}")
        if stream.type in ("subtitle", "attachment") and self._is_held_by_matroska(segment, stream):
            cure = f"name the output .mkv, or leave it out with --streams -{stream.index}"
            raise UpscaleError(f"{what}: {cure}")
        self._leave_out(stream)
        return None

    def _is_held_by_matroska(self, segment: Path, stream: Stream) -> bool:
        if self._out.suffix.lower() == ".mkv":
            return False
        out = self._out.with_suffix(".mkv")
        try:
            return not Muxer(out, self._source, self._picture)._failure(segment, {stream.index: COPY})
        finally:
            out.unlink(missing_ok=True)

    def _leave_out(self, stream: Stream) -> None:
        if stream.index not in self._told:
            self._told.add(stream.index)
            log.warning("left out %s", describe(stream))

    def _not_empty(self, segment: Path, forms: Forms, contents: Contents, is_whole: bool) -> Forms:
        """Leave out streams without packets where the container does, or a part of the clip has none."""
        if is_whole and self._out.suffix.lower() not in MP4_FAMILY:
            return forms
        with self._opened(segment).open() as source:
            for index, found in contents.items():
                if not found and not is_cover(source.streams[index]):
                    self._leave_out(source.streams[index])
        return {index: form for index, form in forms.items() if contents.get(index, True)}

    def _failure(self, segment: Path, forms: Forms) -> str:
        """Try to write some frames with some streams; returns why it fails, or nothing."""
        count = count_frames(segment)
        tick = max(1, round(1 / (self._picture.rate * self._picture.time_base)))
        times = Times(self._picture.time_base, [n * tick for n in range(count)], tick)
        try:
            sent = self._write([segment], times, forms, EVERYTHING, REHEARSED_PACKETS)
            written = forms
            if self._out.suffix.lower() in MP4_FAMILY:  # where a stream without packets vanishes
                written = {index: form for index, form in forms.items() if sent.get(index, True)}
            source = self._opened(segment)
            verify(self._out, source, self._picture, self._selection, written, times, EVERYTHING, sent)
        except Exception as err:  # whatever muxers, and PyAV on the way to them, make of a stream
            if getattr(err, "errno", None) in OF_THE_DISK:
                raise
            return str(err) if isinstance(err, UpscaleError) else reason_of(err)
        return ""

    # Writing

    def _write(
        self, segments: Sequence[Path], times: Times, forms: Forms, span: Span, most: int | None = None
    ) -> Contents:
        """Write a file; returns what of each stream went in."""
        sent: Contents = {}
        with ExitStack() as files:
            layout = Layout(
                files,
                self._opened(segments[0]),
                segments[0],
                self._out,
                self._picture,
                self._selection,
                forms,
                span,
            )
            packets = heapq.merge(
                _copied(layout, span, most, sent),
                self._picture_packets(segments, times, layout.picture_stream),
                key=_decoding_time_s,
            )
            clock = Clock(bool(layout.out.format.flags & MAY_REPEAT))
            for packet in packets:
                clock.set(packet)
                layout.out.mux(packet)
        if writes_aspect(self._out, self._picture):
            aspect = self._picture.sample_aspect_ratio or Fraction(1)
            set_aspect(self._out, self._picture.size, aspect, layout.title)
        return sent

    def _picture_packets(
        self, segments: Sequence[Path], times: Times, out_stream: VideoStream
    ) -> Iterator[Packet[Any]]:
        """Packets of all segments in a row, with the times of the clip."""
        start = 0
        for path in segments:
            with av.open(file_url(path)) as segment:
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


class Clock:
    """Decoding times of each stream that never step back, which muxers refuse; as FFmpeg mends them."""

    def __init__(self, may_repeat: bool) -> None:
        self._least = 0 if may_repeat else 1  # ticks from packet to packet
        self._last: dict[int, int] = {}  # in ticks of the stream

    def set(self, packet: Packet[Any]) -> None:
        """Mend a packet's times (mux_fixup_ts in ffmpeg_mux.c)."""
        tick = packet.stream.time_base
        last = self._last.get(packet.stream_index)
        if packet.dts is None:
            packet.dts = packet.pts
        if packet.dts is None:  # as of a container that has no times
            packet.pts = packet.dts = round((0 if last is None else last + 1) * tick / packet.time_base)
        dts = round(packet.dts * packet.time_base / tick)
        if last is not None and dts < last + self._least:
            pts = dts if packet.pts is None else round(packet.pts * packet.time_base / tick)
            duration = round((packet.duration or 0) * packet.time_base / tick)
            packet.time_base, packet.duration = tick, duration
            dts = last + self._least
            packet.pts, packet.dts = max(pts, dts), dts
        elif packet.pts is not None and packet.pts < packet.dts:
            packet.pts = packet.dts
        self._last[packet.stream_index] = dts


def _copied(layout: Layout, span: Span, most: int | None, sent: Contents) -> Iterator[Packet[Any]]:
    """Packets of all other streams as the output has them; ``sent`` counts what they are made from."""
    streams = [stream for stream in layout.source.streams if stream.type != "attachment"]
    kept = [stream for stream in streams if stream.index in layout.tracks]
    sent.update({stream.index: 0 for stream in kept})
    # A rehearsal counts all packets: of rare ones alone it would have to read the whole file.
    for packet in islice(packets_of(layout.source, kept if most is None else streams), most):
        track = layout.tracks.get(packet.stream_index)
        # Packets of size 0 are the end, as PyAV tells it.
        if track and packet.size and not is_pause(packet) and span.has(packet):
            sent[packet.stream_index] += amount_of(packet)
            span.shift(packet)
            yield from track.packets(packet)
    for track in layout.tracks.values():
        yield from track.rest()


def _decoding_time_s(packet: Packet[Any]) -> Fraction:
    return (packet.dts if packet.dts is not None else packet.pts or 0) * packet.time_base
