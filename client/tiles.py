"""Frames larger than a model takes: cut into equal tiles, and put together again without seams."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from windows import Image, Size

OVERLAP_PX = 64  # lr pixels that neighbouring tiles share; what a tile shows there is blended
UNTRUSTED_PART = 4  # of the overlap, one part at each end is left out: there a tile lacks context most


@dataclass(frozen=True)
class Grid:
    """Equal tiles that cover a frame; the batcher of a server puts only equal shapes together."""

    tile: Size
    """(height, width) in lr pixels."""
    tops: tuple[int, ...]
    """First lr row of each row of tiles."""
    lefts: tuple[int, ...]
    """First lr column of each column of tiles."""

    @property
    def count(self) -> int:
        """Tiles of one frame."""
        return len(self.tops) * len(self.lefts)

    def split(self, lr_window: Image) -> Iterator[Image]:
        """Yield the tiles of a (T, H, W, 3) window, row by row."""
        for top in self.tops:
            for left in self.lefts:
                tile = lr_window[:, top : top + self.tile[0], left : left + self.tile[1]]
                yield np.ascontiguousarray(tile)

    def merge(self, hr_tiles: list[Image], scale: int) -> Image:
        """Put the (h * scale, w * scale, 3) answers to the tiles together to one frame."""
        columns = len(self.lefts)
        rows = [
            _join(hr_tiles[start : start + columns], self.lefts, self.tile[1], scale, axis=1)
            for start in range(0, len(hr_tiles), columns)
        ]
        return _join(rows, self.tops, self.tile[0], scale, axis=0)


def grid_for(size: Size, max_size: Size, multiple_of: int) -> Grid:
    """The fewest equal tiles for a frame.

    Args:
        size: (height, width) of the frame; both sides multiples of ``multiple_of``.
        max_size: The largest tile.
        multiple_of: Of both sides of a tile.
    """
    sides, starts = zip(
        *(_cover(side, most, multiple_of) for side, most in zip(size, max_size, strict=True)), strict=True
    )
    return Grid((sides[0], sides[1]), starts[0], starts[1])


def _cover(length: int, most: int, multiple_of: int) -> tuple[int, tuple[int, ...]]:
    """Side and starts of the fewest equal pieces of at most ``most`` that cover a length."""
    if length <= most:
        return length, (0,)
    most -= most % multiple_of
    overlap = min(OVERLAP_PX, most // 4)
    count = -(-(length - overlap) // (most - overlap))
    side = -(-(length + (count - 1) * overlap) // count)
    side = min(most, -(-side // multiple_of) * multiple_of)
    return side, tuple(i * (length - side) // (count - 1) for i in range(count))


def _join(parts: list[Image], starts: tuple[int, ...], side: int, scale: int, axis: int) -> Image:
    overlaps = iter((before + side - after) * scale for before, after in pairwise(starts))
    return reduce(lambda done, part: _blend(done, part, next(overlaps), axis), parts)


def _blend(before: Image, after: Image, overlap: int, axis: int) -> Image:
    """Join two images that show the same in their last and first ``overlap`` pixels."""
    cut = before.shape[axis] - overlap
    before, old = np.split(before, [cut], axis)
    new, after = np.split(after, [overlap], axis)
    weight = _ramp(overlap).reshape((-1,) + (1,) * (old.ndim - axis - 1))
    mixed = np.rint(old * (1 - weight) + new * weight).astype(np.uint8)
    return np.concatenate([before, mixed, after], axis)


def _ramp(length: int) -> NDArray[np.float32]:
    """Weights of the later image: 0, then a straight rise, then 1."""
    untrusted = length // UNTRUSTED_PART
    rise = np.linspace(0, 1, length - 2 * untrusted + 2, dtype=np.float32)[1:-1]
    return np.pad(rise, untrusted, constant_values=(0, 1))
