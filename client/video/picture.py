"""What a clip is made of: its frames, what they have in common, and a part of them."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from ..frames.windows import Image, Size
from .color import Color


@dataclass(frozen=True, eq=False)
class Frame:
    """One decoded frame."""

    image: Image
    """(H, W, 3) uint8 RGB, 0..255."""
    pts: int
    """Presentation time, in ``Picture.time_base``."""


@dataclass(frozen=True)
class Picture:
    """What all frames of a clip have in common."""

    size: Size
    rate: Fraction
    """Frames per second; nominal where the frame rate varies."""
    time_base: Fraction
    """Seconds per tick of the timestamps."""
    color: Color
    sample_aspect_ratio: Fraction | None
    display_matrix: tuple[int, ...] | None
    """FFmpeg's nine integers that rotate and flip the picture on display."""


@dataclass(frozen=True)
class Range:
    """A part of a clip; times count from its first frame."""

    start_s: Fraction = Fraction(0)
    duration_s: Fraction | None = None
    frames: int | None = None
    """At most so many."""
