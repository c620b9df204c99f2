"""Frames larger than a model takes: cut into equal tiles, and put together again without seams."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .windows import Image, Size

OVERLAP_PX = 64  # lr pixels that neighboring tiles share; what a tile shows there is blended
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
    """Put images in a row into one; where two of them show the same, the earlier fades into the later."""
    if len(parts) == 1:
        return parts[0]
    shape = list(parts[0].shape)
    shape[axis] = (starts[-1] + side) * scale
    joined = np.empty(shape, np.uint8)
    line, done = np.moveaxis(joined, axis, 0), 0
    for part, start in zip(parts, starts, strict=True):
        pixels, begin = np.moveaxis(part, axis, 0), start * scale
        untrusted = max(0, done - begin) // UNTRUSTED_PART
        first, last = begin + untrusted, max(begin, done - untrusted)
        line[first:last] = _faded(line[first:last], pixels[untrusted : last - begin])
        line[last : begin + len(pixels)] = pixels[last - begin :]
        done = begin + len(pixels)
    return joined


def _faded(old: Image, new: Image) -> NDArray[np.uint16]:
    """Two images of equal shape, less and less of the first along axis 0."""
    # In 256ths: whole numbers of 16 bits hold them, and take a fraction of the time of floats.
    weight = np.rint(np.linspace(0, 256, len(old) + 2)[1:-1]).astype(np.uint16).reshape(-1, 1, 1)
    faded: NDArray[np.uint16] = (old * (256 - weight) + new * weight + 128) >> 8
    return faded
