"""When frames are shown, and which part of a source's clock an output covers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from av.container import InputContainer
from av.packet import Packet

from .streams import is_cover

if TYPE_CHECKING:
    from av.container.core import Chapter  # exists for type checkers only


@dataclass(frozen=True)
class Times:
    """When the frames of a clip are shown."""

    time_base: Fraction
    pts: Sequence[int]
    last_duration: int

    def at(self, index: int) -> int:
        """Time of a frame; counted on at the pace of the first two for the negative indices of B-frames."""
        if index >= 0:
            return self.pts[index]
        step = self.pts[1] - self.pts[0] if len(self.pts) > 1 else self.last_duration
        return self.pts[0] + index * step

    @property
    def end(self) -> int:
        """When the last frame ends."""
        return self.pts[-1] + self.last_duration

    def duration(self, index: int) -> int:
        """How long a frame is shown."""
        return self.pts[index + 1] - self.pts[index] if index + 1 < len(self.pts) else self.last_duration


@dataclass(frozen=True)
class Span:
    """The part of a source that is kept, in seconds of its own clock, and what is zero in the output."""

    start_s: Fraction | None
    """None: from the first packet to the last."""
    end_s: Fraction | None
    origin_s: Fraction = Fraction(0)
    """What is zero in the output."""

    def has(self, packet: Packet[Any]) -> bool:
        """Whether a packet belongs to it; a cover belongs everywhere, a subtitle while it is shown."""
        if self.start_s is None or self.end_s is None or packet.stream.type == "video":
            return True
        time_s = (packet.pts or 0) * packet.time_base
        shown_s = (packet.duration or 0) * packet.time_base if packet.stream.type == "subtitle" else 0
        return time_s < self.end_s and (time_s >= self.start_s or time_s + shown_s > self.start_s)

    def shift(self, packet: Packet[Any]) -> None:
        """Let a packet's clock begin with the output's."""
        if not self.origin_s or is_cover(packet.stream):
            return
        ticks = round(self.origin_s / packet.time_base)
        packet.pts = None if packet.pts is None else packet.pts - ticks
        packet.dts = None if packet.dts is None else packet.dts - ticks
        if self.start_s is not None and packet.stream.type == "subtitle" and (packet.pts or 0) < 0:
            packet.duration = (packet.duration or 0) + (packet.pts or 0)  # on screen when the part begins
            packet.pts = packet.dts = 0

    def chapters(self, source: InputContainer) -> list[Chapter]:
        """The chapters in it, cut at its ends."""
        kept = source.chapters()
        for chapter in kept:
            tick = chapter["time_base"] or Fraction(1)
            origin = round(self.origin_s / tick)
            if self.start_s is not None and self.end_s is not None:
                chapter["start"] = max(chapter["start"], round(self.start_s / tick))
                chapter["end"] = min(chapter["end"], round(self.end_s / tick))
            chapter["start"], chapter["end"] = chapter["start"] - origin, chapter["end"] - origin
        return [chapter for chapter in kept if chapter["start"] < chapter["end"]]


EVERYTHING = Span(None, None)
