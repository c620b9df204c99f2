"""When frames are shown, and which part of a source's clock an output covers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from av.container import InputContainer
from av.packet import Packet

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
    """The part of a source, in seconds of its own clock, that is kept and begins the output."""

    start_s: Fraction | None
    """None: from the first packet, and no clock is changed."""
    end_s: Fraction | None

    def has(self, packet: Packet[Any]) -> bool:
        """Whether a packet belongs to it; a cover belongs everywhere."""
        if self.start_s is None or self.end_s is None or packet.stream.type == "video":
            return True
        return self.start_s <= (packet.pts or 0) * packet.time_base < self.end_s

    def shift(self, packet: Packet[Any]) -> None:
        """Let a packet's clock begin with it."""
        if self.start_s is not None and packet.stream.type != "video":
            ticks = round(self.start_s / packet.time_base)
            packet.pts, packet.dts = (packet.pts or 0) - ticks, (packet.dts or 0) - ticks

    def chapters(self, source: InputContainer) -> list[Chapter]:
        """The chapters in it, cut at its ends."""
        kept = source.chapters()
        if self.start_s is None or self.end_s is None:
            return kept
        for chapter in kept:
            tick = chapter["time_base"] or Fraction(1)
            start, end = round(self.start_s / tick), round(self.end_s / tick)
            chapter["start"] = max(chapter["start"], start) - start
            chapter["end"] = min(chapter["end"], end) - start
        return [chapter for chapter in kept if chapter["start"] < chapter["end"]]


EVERYTHING = Span(None, None)
