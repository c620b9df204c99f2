"""Frames in, sequences out: what a recurrent model is given of a clip, piece by piece.

A piece is a sequence of its own, so that several are under way at once and any can be done again. It begins
some frames early, for the model to have a state when the first frame comes whose answer is wanted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from .windows import Image, never

MOST_FRAMES = 50  # of a sequence: half a segment; with 8 to warm up, a sixth more work
LEAST_FRAMES = 8
MOST_BYTES = 1 << 30  # of its answers, which are kept until all are there
Item = TypeVar("Item")


@dataclass(frozen=True)
class FrameSequence:
    """Consecutive frames of one shot."""

    frames: Image
    """(T, H, W, 3) uint8 RGB."""
    skip: int
    """How many at the beginning only warm the model up."""

    @property
    def size(self) -> int:
        """Values of all frames."""
        return int(self.frames.size)


def sequence_length(hr_frame_bytes: int, segment_frames: int = MOST_FRAMES) -> int:
    """Frames of a sequence whose answers are wanted: those of a segment, in equal parts.

    It depends on nothing that may change between runs, so that one that is resumed cuts alike.
    """
    most = min(MOST_FRAMES, max(LEAST_FRAMES, MOST_BYTES // hr_frame_bytes))
    parts = -(-segment_frames // most)
    return -(-segment_frames // parts)


def sequences(
    frames: Iterable[Item],
    begins: Callable[[int], bool],
    warmup: int,
    is_cut: Callable[[Item, Item], bool] = never,
    start: int = 0,
    stop: int | None = None,
) -> Iterator[tuple[list[Item], int]]:
    """Yield the frames of each sequence, and how many of them only warm up.

    Args:
        frames: Of a clip, from anywhere.
        begins: Whether a sequence begins at the frame of this index among them.
        warmup: Frames that a sequence begins early; it never looks over a cut.
        is_cut: Whether a cut lies between two frames.
        start: Index of the first frame to be answered.
        stop: Index of the first one after these that is not.
    """
    before: deque[Item] = deque(maxlen=warmup)  # of the shot, up to where the next sequence begins
    current: list[Item] = []
    skip = 0
    last: list[Item] = []
    for index, frame in enumerate(frames):
        cut = bool(last) and is_cut(last[0], frame)
        last = [frame]
        if stop is not None and index >= stop:
            break
        if current and (cut or begins(index)):
            yield current, skip
            current = []
        if cut:
            before.clear()
        if index >= start:
            if not current:
                current, skip = list(before), len(before)
            current.append(frame)
        before.append(frame)
    if current:
        yield current, skip
