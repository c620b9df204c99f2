"""Decoding that begins at a key frame in the middle of a file, where that gives the same frames."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import av
from av.container import InputContainer
from av.packet import Packet
from av.video.stream import VideoStream

from .boundary import UNDECODABLE

# Containers with an index of key frames by time. Others guess where a time is, or have times that may begin
# anew: there, decoding begins at the start.
INDEXED = frozenset(("mov", "mp4", "matroska", "webm"))
MOST_TRIES = 8  # key frames to go back by: those of a stream may be shown after the frames before them
FIRST_PACKETS = 64  # looked through for a key frame


@dataclass
class Seek:
    """Frames from a key frame on, and what decoding them has met; iterate ``frames`` once."""

    frames: Iterator[av.VideoFrame]
    key_pts: int
    """Time of the key frame, which is the first of ``frames``."""
    packets: int
    """Packets of the stream so far, those before the key frame among them."""
    decoded: int
    """Frames of them."""
    refused: int = 0
    """Packets that could not be decoded, from the key frame on."""
    damaged: int = 0
    """Frames that came out of the decoder, but not whole, from the key frame on."""


def seek(container: InputContainer, stream: VideoStream, first: int, target: int) -> Seek | None:
    """Begin at the last key frame that is shown at a time or before it.

    Frames that are shown before the key frame and stored after it, as open groups of pictures have them,
    need pictures from before it and are left out.

    Args:
        container: Of its own, for this alone; its first frame is decoded here, which tells some decoders
            which encoder it was.
        stream: One of its streams.
        first: Time of the clip's first frame, in ticks.
        target: The time, in ticks.

    Returns:
        None if the frames might differ from those that decoding from the start gives, or are the same.
    """
    if not INDEXED & set(container.format.name.split(",")) or next(container.decode(stream), None) is None:
        return None
    key = _packets_from_key(container, stream, target)
    if key is None:
        return None
    packet, packets = key
    assert packet.pts is not None
    before = _packets_before(stream, packet)
    if packet.pts <= first or not before:
        return None
    found = Seek(iter(()), packet.pts, before, before)
    frames = _decoded(found, chain([packet], packets))
    start = next(frames, None)
    # A key frame from which the picture only recovers step by step is not shown itself.
    if start is None or start.pts != packet.pts or start.is_corrupt:
        return None
    found.frames = chain([start], frames)
    return found


def _packets_from_key(
    container: InputContainer, stream: VideoStream, target: int
) -> tuple[Packet[Any], Iterator[Packet[Any]]] | None:
    """A key frame's packet that is shown at a time or before it, and those stored after it."""
    time = target
    for _ in range(MOST_TRIES):
        try:
            container.seek(time, stream=stream, backward=True)
        except av.FFmpegError:
            return None
        packets = container.demux(stream)
        for packet, _ in zip(packets, range(FIRST_PACKETS), strict=False):
            if packet.is_keyframe and packet.size:
                break
        else:
            return None
        if packet.pts is None or packet.is_discard:
            return None
        if packet.pts <= target:
            return packet, packets
        time = min(packet.pts if packet.dts is None else packet.dts, time) - 1
    return None


def _packets_before(stream: VideoStream, key: Packet[Any]) -> int:
    """How many packets lie before one, by the index where it lists all; 1 where it lists key frames alone."""
    entries = [(entry.timestamp, entry.is_discard) for entry in stream.index_entries]
    if not stream.frames or len(entries) < stream.frames:
        return 1
    return sum(time < (key.dts or 0) and not is_discard for time, is_discard in entries)


def _decoded(found: Seek, packets: Iterator[Packet[Any]]) -> Iterator[av.VideoFrame]:
    while True:
        packet = None
        try:
            packet = next(packets, None)
            if packet is None:
                return
            if not packet.size and packet.dts is not None:
                continue  # the frame before once more, as Theora says it
            if packet.size and not packet.is_discard:
                found.packets += 1
                found.decoded += packet.pts is not None and packet.pts < found.key_pts
            for frame in packet.decode():
                if frame.pts is not None and frame.pts < found.key_pts:
                    continue  # counted already
                found.decoded += 1
                found.damaged += frame.is_corrupt
                yield frame
        except UNDECODABLE:
            found.refused += packet is None or packet.pts is None or packet.pts >= found.key_pts
