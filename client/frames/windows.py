"""Frames in, windows out: which lr frames travel together, and how they are fitted to the model's sizes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Size = tuple[int, int]  # (height, width)
Image = NDArray[np.uint8]  # (H, W, 3) RGB, 0..255
Item = TypeVar("Item")


def never(before: Item, after: Item) -> bool:
    """Say that no cut lies between two frames."""
    return False


def windows(
    frames: Iterable[Item], size: int, is_cut: Callable[[Item, Item], bool] = never
) -> Iterator[tuple[Item, ...]]:
    """Yield one window of ``size`` (odd) frames per frame, centered on it, in order.

    A clip is a row of shots, and a window never looks out of its shot: both ends of a shot repeat
    their edge frame. Without cuts the whole clip is one shot.
    """
    half = size // 2
    seen: deque[Item] = deque(maxlen=size)

    def rest_of_shot() -> Iterator[tuple[Item, ...]]:
        for _ in range(half if seen else 0):
            seen.append(seen[-1])
            if len(seen) == size:
                yield tuple(seen)
        seen.clear()

    for frame in frames:
        if seen and is_cut(seen[-1], frame):
            yield from rest_of_shot()
        if not seen:
            seen.extend([frame] * half)
        seen.append(frame)
        if len(seen) == size:
            yield tuple(seen)
    yield from rest_of_shot()


def fitted_size(size: Size, multiple_of: int, min_size: Size) -> Size:
    """The smallest size a model takes that holds ``size``: at least the minimum, sides rounded up."""
    height, width = (
        -(-max(side, least) // multiple_of) * multiple_of for side, least in zip(size, min_size, strict=True)
    )
    return height, width


def pad(image: Image, size: Size) -> Image:
    """Grow an image to ``size`` at its bottom and right by repeating the last row and column.

    Args:
        image: (H, W, 3) uint8.
        size: (height, width), nowhere smaller than the image.
    """
    height, width, _ = image.shape
    if (height, width) == size:
        return image
    return np.pad(image, ((0, size[0] - height), (0, size[1] - width), (0, 0)), mode="edge")


def crop(image: Image, size: Size) -> Image:
    """Undo ``pad``: the top left (height, width) of an (H, W, 3) image, as a view."""
    return image[: size[0], : size[1]]
