"""Training windows: random crops of footage, augmented, with motion made up for photos."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from export.spec import WINDOW
from export.training.degradations import bi
from export.training.footage import Clip

MIN_STD = 6.0  # grey levels; flatter crops teach nothing
CROP_TRIES = 5
PHOTO_MARGIN = 32  # hr pixels kept around a photo's crop for its made-up motion
MAX_SHIFT = 12.0  # hr pixels per frame
MAX_SHAKE = 0.3  # standard deviation, hr pixels
MAX_TURN = math.radians(1.5)  # per frame
MAX_ZOOM = 0.015  # per frame
SKIP_FRAME_SHARE = 0.25  # of the windows take every second frame: larger motion


downscale = bi


class Batch(NamedTuple):
    """Windows, and how the camera moved where that is known."""

    hr_windows: Tensor
    """(N, 3, 3, H, W) float32 RGB, 0..1: frames t-1, t, t+1."""
    motion: Tensor
    """(N, 2, 2, 3) float32: per neighbour the affine map of a point of frame t to where it lies in the
    neighbour; (x, y) run from -1 to 1 between the frame's edges. NaN where unknown."""


class WindowSampler:
    """Draws batches of hr windows; batch ``step`` is the same however often training was resumed."""

    def __init__(
        self, clips: Sequence[Clip], photos: Sequence[Clip], *, patch: int, photo_share: float, seed: int
    ) -> None:
        """Sample ``patch`` x ``patch`` hr crops; ``photo_share`` of them from ``photos``."""
        self.clips, self.photos = clips, photos
        self.patch, self.seed = patch, seed
        self.photo_share = photo_share if photos else 0.0
        # Long clips hold more, but not in proportion: their frames resemble each other.
        weights = np.sqrt([clip.segments.shape[0] for clip in clips])
        self.weights = weights / weights.sum()

    def batch(self, step: int, size: int) -> Batch:
        """The batch of a step."""
        rng = np.random.default_rng((self.seed, step))
        windows = [
            self._from_photo(rng) if rng.random() < self.photo_share else self._from_clip(rng)
            for _ in range(size)
        ]
        return Batch(*(torch.stack(tensors) for tensors in zip(*windows, strict=True)))

    def _from_clip(self, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        clip = self.clips[rng.choice(len(self.clips), p=self.weights)]
        count, length, height, width, _ = clip.segments.shape
        stride = 2 if rng.random() < SKIP_FRAME_SHARE and length > 2 * (WINDOW - 1) else 1
        for _ in range(CROP_TRIES):
            segment = int(rng.integers(count))
            first = int(rng.integers(length - stride * (WINDOW - 1)))
            y, x = int(rng.integers(height - self.patch + 1)), int(rng.integers(width - self.patch + 1))
            times = slice(first, first + stride * (WINDOW - 1) + 1, stride)
            crop = clip.segments[segment, times, y : y + self.patch, x : x + self.patch]
            if crop[WINDOW // 2].std() > MIN_STD:
                break
        window = _turned(torch.from_numpy(np.array(crop)), rng)
        if rng.random() < 0.5:
            window = window.flip(0)  # time reversal
        return window, torch.full((WINDOW - 1, 2, 3), torch.nan)

    def _from_photo(self, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Move a virtual camera over a photo: shift, turn and zoom at a steady rate, plus a little shake."""
        image = self.photos[int(rng.integers(len(self.photos)))].segments[0, 0]
        side = min(self.patch + 2 * PHOTO_MARGIN, *image.shape[:2])
        y, x = (int(rng.integers(full - side + 1)) for full in image.shape[:2])
        crop = torch.from_numpy(np.array(image[None, y : y + side, x : x + side]))
        shift = rng.uniform(-MAX_SHIFT, MAX_SHIFT, 2)
        turn, zoom = rng.uniform(-MAX_TURN, MAX_TURN), rng.uniform(-MAX_ZOOM, MAX_ZOOM)
        reach = self.patch / side  # grid_sample's unit is half a side of the source
        camera = torch.zeros(WINDOW, 3, 3)  # a point of each frame -> where it lies in the photo
        for index in range(WINDOW):
            t = index - WINDOW // 2
            factor = reach * math.exp(zoom * t)
            cos, sin = factor * math.cos(turn * t), factor * math.sin(turn * t)
            dx, dy = 2 * (shift * t + rng.normal(0, MAX_SHAKE, 2)) / side
            camera[index] = torch.tensor([[cos, -sin, dx], [sin, cos, dy], [0, 0, 1]])
        grid = F.affine_grid(camera[:, :2], [WINDOW, 3, self.patch, self.patch], align_corners=False)
        source = _turned(crop, rng).expand(WINDOW, -1, -1, -1)
        moved = F.grid_sample(source, grid, mode="bicubic", padding_mode="reflection", align_corners=False)
        motion = torch.linalg.inv(camera[::2]) @ camera[WINDOW // 2]
        return moved.clamp(0, 1), motion[:, :2]


def _turned(frames: Tensor, rng: np.random.Generator) -> Tensor:
    """(T, H, W, 3) uint8 -> (T, 3, H, W) float32, 0..1, mirrored and turned at random."""
    images = frames.permute(0, 3, 1, 2).float() / 255
    if rng.random() < 0.5:
        images = images.flip(-1)
    return torch.rot90(images, int(rng.integers(4)), (-2, -1))
