"""Where one shot ends and the next begins."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ..video.picture import Frame
from .windows import Image

THUMBNAIL_PX = 32  # shorter side: small enough that motion and grain hardly count, large enough for a cut
DEFAULT_THRESHOLD = 25.0  # gray levels; cuts of real clips start near 30, the fastest pans stay below 20


def thumbnail(image: Image) -> NDArray[np.float64]:
    """Average an (H, W, 3) image over squares, so that its shorter side has about THUMBNAIL_PX pixels."""
    height, width, channels = image.shape
    side = max(1, min(height, width) // THUMBNAIL_PX)
    rows, columns = height // side, width // side
    whole = image[: rows * side, : columns * side]
    # Rows first, in whole numbers: the same means as of floats in any order, for a fourteenth of the time
    # at 1280x720.
    sums = whole.reshape(rows, side, columns * side * channels).sum(1, dtype=np.uint32)
    means: NDArray[np.float64] = sums.reshape(rows, columns, side, channels).sum(2) / side**2
    return means


@dataclass
class CutDetector:
    """Tells whether a cut lies between two consecutive frames, from these two frames alone.

    So a run that is continued finds the cuts of the run before it.
    """

    threshold: float = DEFAULT_THRESHOLD
    """Mean difference of two thumbnails, in gray levels, from which it is a cut."""
    cuts: list[int] = field(default_factory=list)
    """Times of the frames that begin a new shot, in ticks of the clip."""
    _last: tuple[Frame, NDArray[np.float64]] | None = None

    def __call__(self, before: Frame, after: Frame) -> bool:
        """Compare two frames; the one seen last is not reduced again."""
        known = self._last[1] if self._last and self._last[0] is before else thumbnail(before.image)
        new = thumbnail(after.image)
        self._last = (after, new)
        is_cut = bool(np.abs(new - known).mean() >= self.threshold)
        if is_cut:
            self.cuts.append(after.pts)
        return is_cut
