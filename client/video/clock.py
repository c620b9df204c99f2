"""Packets on one clock: joined recordings count on where the one before ended, as FFmpeg has them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any, cast

from av.container import InputContainer
from av.format import Flags
from av.packet import Packet
from av.stream import Stream

# FFmpeg's own bounds (ts_discontinuity_process in ffmpeg_demux.c).
LARGEST_GAP_S = Fraction(10)
LARGEST_STEP_BACK_S = Fraction(1, 10)

MAY_JUMP = cast(int, Flags.ts_discont.value)
MAY_REPEAT = cast(int, Flags.ts_nonstrict.value)


def may_jump(container: InputContainer) -> bool:
    """Whether times in such a file may begin anew in the middle: transport and program streams."""
    return bool(container.format.flags & MAY_JUMP)


def packets_of(
    container: InputContainer, streams: Sequence[Stream], on_jump: Callable[[], None] = lambda: None
) -> Iterator[Packet[Any]]:
    """The packets of some streams, times on one clock; the empty packets at the end flush decoders.

    A new recording in a transport stream begins with other times, on all its streams alike: what they
    differ by is taken from each packet from there on.
    """
    if not may_jump(container):
        yield from container.demux(streams) if streams else ()
        return
    wanted = {stream.index for stream in streams}
    offset_s = Fraction(0)
    last_s: Fraction | None = None
    seen: dict[int, tuple[Fraction, Fraction]] = {}  # decoding time of the last packet, and its duration
    for packet in container.demux():
        if packet.size and packet.dts is not None and packet.stream.type in ("video", "audio"):
            time_s = packet.dts * packet.time_base + offset_s
            jump_s = Fraction(0)
            if packet.stream_index in seen:
                before_s, duration_s = seen[packet.stream_index]
                # Pictures are decoded in order: one step back by a picture is a new recording.
                is_picture = packet.stream.type == "video" and duration_s > 0
                allowed_s = min(LARGEST_STEP_BACK_S, duration_s / 2) if is_picture else LARGEST_STEP_BACK_S
                if time_s < before_s - allowed_s or time_s > before_s + duration_s + LARGEST_GAP_S:
                    jump_s = time_s - before_s - duration_s
            elif last_s is not None and abs(time_s - last_s) > LARGEST_GAP_S:
                jump_s = time_s - last_s
            if jump_s:
                offset_s -= jump_s
                on_jump()
            last_s = time_s - jump_s
            seen[packet.stream_index] = (last_s, (packet.duration or 0) * packet.time_base)
        if offset_s and packet.size:
            ticks = round(offset_s / packet.time_base)
            packet.pts = None if packet.pts is None else packet.pts + ticks
            packet.dts = None if packet.dts is None else packet.dts + ticks
        if packet.stream.index in wanted:  # the packet's own number is 0 at the end
            yield packet
