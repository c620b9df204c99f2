"""Footage in the memory of a device: what a sampler drew is cut out there by one gather per kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from export.data.clips import Clip
from export.data.windows import Batch, Drawn, WindowSampler, known_motion, moved
from export.errors import ExportError
from export.spec import CHANNELS

HELD_SHARE = 0.5  # of a GPU's free memory that footage may take; the rest is for training


class Located(NamedTuple):
    """What was drawn, as places in a device's memory; small, and of a few shapes only."""

    clips: Tensor
    """(N, 4) int64: where a window's first value lies, and how far on the next frame, row and column are:
    turned, mirrored and reversed windows begin at another corner and go other ways."""
    photos: Tensor
    """(M, 4) int64: the same of the cut-outs that cameras move over."""
    cameras: Tensor
    """(M, L, 3, 3) float32, see ``windows.PhotoWindow``."""
    motion: Tensor
    """(N + M, 2 (L - 2), 2, 3) float32, see ``windows.Batch``."""


class HeldFootage:
    """All footage of a sampler in a device's memory, as uint8: it then waits for neither disk nor host."""

    def __init__(self, sampler: WindowSampler, device: torch.device) -> None:
        """Copy it there.

        Raises:
            ExportError: it does not fit into the memory of ``device``.
        """
        self.sampler, self.device = sampler, device
        sources = [*sampler.clips, *sampler.photos]
        _require_room(sources, device)
        ends = np.cumsum([0, *(source.segments.size for source in sources)])
        self.starts = [int(start) for start in ends[:-1]]
        self.memory = torch.empty(int(ends[-1]), dtype=torch.uint8, device=device)
        for source, start in zip(sources, self.starts, strict=True):
            values = torch.from_numpy(np.ascontiguousarray(source.segments)).flatten()
            self.memory[start : start + len(values)] = values

    def locate(self, drawn: Drawn, length: int) -> Located:
        """On the host, windows of ``length`` frames; touches no device, and so may run in other processes."""
        clips, photos = drawn
        patch, side = self.sampler.patch, self.sampler.side
        places = []
        for c in clips:
            frames = self.sampler.clips[c.clip].segments.shape
            frame, row, column = _steps(frames)
            first = self.starts[c.clip] + (c.segment * frames[1] + c.first) * frame + c.y * row + c.x * column
            first, row, column = _turned(first, row, column, patch, c.mirrored, c.quarter_turns)
            later = frame * c.stride
            if c.is_reversed:
                first, later = first + (length - 1) * later, -later
            places.append((first, later, row, column))
        cutouts = []
        for p in photos:
            index = len(self.sampler.clips) + p.photo
            _, row, column = _steps(self.sampler.photos[p.photo].segments.shape)
            first = self.starts[index] + p.y * row + p.x * column
            first, row, column = _turned(first, row, column, side, p.mirrored, p.quarter_turns)
            cutouts.append((first, 0, row, column))
        cameras = np.array([p.camera for p in photos], np.float32).reshape(-1, length, 3, 3)
        return Located(
            torch.tensor(places, dtype=torch.int64).view(-1, 4),
            torch.tensor(cutouts, dtype=torch.int64).view(-1, 4),
            torch.from_numpy(cameras),
            known_motion(drawn, length),
        )

    def cut(self, located: Located) -> Batch:
        """The windows, on the device; ``located`` lies there too."""
        length = located.cameras.shape[1]
        windows = self._gather(located.clips, length, self.sampler.patch)
        if len(located.photos):
            images = self._gather(located.photos, 1, self.sampler.side)[:, 0]
            windows = torch.cat((windows, moved(images, located.cameras, self.sampler.patch)))
        return Batch(windows, located.motion)

    def _gather(self, places: Tensor, length: int, side: int) -> Tensor:
        """(N, length, 3, side, side) float32, 0..1."""
        first, later, row, column = places.view(-1, 4, 1, 1, 1, 1).unbind(1)
        t, channel, y, x = (torch.arange(n, device=self.device) for n in (length, CHANNELS, side, side))
        at = first + later * t.view(-1, 1, 1, 1) + channel.view(-1, 1, 1) + row * y.view(-1, 1) + column * x
        return self.memory[at].float() / 255


def _steps(shape: Sequence[int]) -> tuple[int, int, int]:
    """From a value to the same one of the next frame, row and column, in segments of ``shape``."""
    _, _, height, width, channels = shape
    return height * width * channels, width * channels, channels


def _turned(
    first: int, row: int, column: int, side: int, mirrored: bool, quarter_turns: int
) -> tuple[int, int, int]:
    """Where a square's first value lies and which ways its rows and columns go once it is turned."""
    if mirrored:
        first, column = first + (side - 1) * column, -column
    for _ in range(quarter_turns):
        first, row, column = first + (side - 1) * column, -column, row
    return first, row, column


def _require_room(sources: Sequence[Clip], device: torch.device) -> None:
    """Refuse footage that would fill the memory of a GPU; the CPU's may be swapped."""
    if device.type != "cuda":
        return
    needed, (free, _) = sum(source.segments.nbytes for source in sources), torch.cuda.mem_get_info(device)
    if needed > HELD_SHARE * free:
        raise ExportError(
            f"expected footage of at most {HELD_SHARE * free / 1e9:.1f} GB to hold on {device}, found "
            f"{needed / 1e9:.1f} GB; use fewer clips, or leave the footage on disk"
        )
