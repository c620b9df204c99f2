"""Training windows: random crops of video clips, augmented, and of photos, over which a camera moves."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from export.data.clips import Clip
from export.spec import WINDOW

CROP_TRIES = 4  # the sharpest of so many is taken: nothing is learned from flat ones
PHOTO_MARGIN = 32  # hr pixels around a photo's crop, for the camera's motion
MAX_SHIFT = 12.0  # hr pixels per frame
TRIPOD_SHARE = 0.3  # of the windows of photos have no motion, as much video has none
MAX_SHAKE = 0.3  # standard deviation, hr pixels
MAX_TURN = math.radians(1.5)  # per frame
MAX_ZOOM = 0.015  # per frame
SKIP_FRAME_SHARE = 0.25  # of the windows take every second frame: larger motion


def windowed(frames: Tensor) -> Tensor:
    """The windows of longer crops, those of a crop in a row.

    Args:
        frames: (N, L, 3, h, w), of any resolution.

    Returns:
        (N (L - 2), 3, 3, h, w): frames t-1, t, t+1.
    """
    windows = [frames[:, t : t + WINDOW] for t in range(frames.shape[1] - WINDOW + 1)]
    return torch.stack(windows, 1).flatten(0, 1)


class ClipWindow(NamedTuple):
    """Where a window is cut from a clip, and how it is augmented."""

    clip: int
    segment: int
    first: int
    stride: int
    y: int
    x: int
    mirrored: bool
    quarter_turns: int
    is_reversed: bool


class PhotoWindow(NamedTuple):
    """Where a window is cut from a photo, and how a virtual camera moves over it."""

    photo: int
    y: int
    x: int
    mirrored: bool
    quarter_turns: int
    camera: NDArray[np.float32]
    """(L, 3, 3): per frame the affine map of its points to where they lie in the cut-out."""


Sampled = tuple[list[ClipWindow], list[PhotoWindow]]


class WindowSampler:
    """Samples batches of hr windows; batch ``step`` is the same however often training was resumed.

    What is sampled does not depend on where it is cut: here, or on a GPU by ``gpu.GpuFootage``.
    """

    def __init__(
        self,
        clips: Sequence[Clip],
        photos: Sequence[Clip],
        *,
        patch: int,
        photo_share: float,
        seed: int,
    ) -> None:
        """Sample ``patch`` x ``patch`` hr crops; ``photo_share`` of them from ``photos``.

        Args:
            clips: video clips.
            photos: photos and line art, may be empty.
            patch: hr pixels a side.
            photo_share: share of the windows from ``photos``, if there are any.
            seed: with the step, decides a batch.
        """
        self.clips, self.photos = clips, photos
        self.patch, self.seed = patch, seed
        self.photo_share = photo_share if photos else 0.0
        # Long clips hold more, but not in proportion: their frames resemble each other.
        self.weights = _shares([clip.weight * math.sqrt(len(clip.segments)) for clip in clips])
        self.photo_weights = _shares([photo.weight for photo in photos])
        self.side = min([patch + 2 * PHOTO_MARGIN, *(min(p.segments.shape[2:4]) for p in photos)])
        """Hr pixels a side of what is cut out of a photo before the camera moves over it."""

    def batch(self, step: int, size: int, length: int = WINDOW) -> Tensor:
        """The batch of a step, (N, L, 3, H, W) float32 RGB, 0..1, on the CPU.

        Args:
            step: with the seed, decides what is sampled.
            size: crops.
            length: consecutive frames of each, 3 to 7.
        """
        return self.cut(self.sample(step, size, length), length)

    def sample(self, step: int, size: int, length: int = WINDOW) -> Sampled:
        """What ``batch`` cuts: windows of clips, then those of photos."""
        rng = np.random.default_rng((self.seed, step))
        # At most two numbers of photos: a CUDA graph is captured for each.
        photos = int(size * self.photo_share + rng.random())
        return (
            [self._sample_clip(rng, length) for _ in range(size - photos)],
            [self._sample_photo(rng, length) for _ in range(photos)],
        )

    def cut(self, sampled: Sampled, length: int) -> Tensor:
        """Windows of ``length`` frames from disk, on the CPU."""
        clips, photos = sampled
        windows = [self._cut_clip(window, length) for window in clips]
        windows += [self._cut_photo(window) for window in photos]
        return torch.stack(windows)

    def _sample_clip(self, rng: np.random.Generator, length: int) -> ClipWindow:
        index = int(rng.choice(len(self.clips), p=self.weights))
        segments = self.clips[index].segments
        count, available, height, width, _ = segments.shape
        stride = 2 if rng.random() < SKIP_FRAME_SHARE and available > 2 * (length - 1) else 1
        crops = []
        for _ in range(CROP_TRIES):
            segment = int(rng.integers(count))
            first = int(rng.integers(available - stride * (length - 1)))
            y, x = int(rng.integers(height - self.patch + 1)), int(rng.integers(width - self.patch + 1))
            # On the host wherever it is cut, or every crop would wait for a GPU; of a quarter of the pixels.
            center = segments[segment, first + stride * (length // 2)]
            green = center[y : y + self.patch : 2, x : x + self.patch : 2, 1].astype(np.int16)
            sharpness = sum(float(np.abs(np.diff(green, axis=axis)).mean()) for axis in (0, 1))
            crops.append((sharpness, segment, first, y, x))
        _, segment, first, y, x = max(crops)
        return ClipWindow(index, segment, first, stride, y, x, *_sample_turn(rng), bool(rng.random() < 0.5))

    def _cut_clip(self, window: ClipWindow, length: int) -> Tensor:
        """(L, 3, patch, patch) float32, 0..1."""
        frames = self.clips[window.clip].segments[
            window.segment,
            window.first : window.first + window.stride * (length - 1) + 1 : window.stride,
            window.y : window.y + self.patch,
            window.x : window.x + self.patch,
        ]
        images = _turned(frames, window.mirrored, window.quarter_turns)
        return images.flip(0) if window.is_reversed else images

    def _sample_photo(self, rng: np.random.Generator, length: int) -> PhotoWindow:
        """Move a virtual camera over a photo, if it moves: a steady shift, turn and zoom, and some shake."""
        index = int(rng.choice(len(self.photos), p=self.photo_weights))
        side = self.side
        y, x = (int(rng.integers(full - side + 1)) for full in self.photos[index].segments.shape[2:4])
        pace = float(rng.random() >= TRIPOD_SHARE)
        shift = pace * rng.uniform(-MAX_SHIFT, MAX_SHIFT, 2)
        turn, zoom = pace * rng.uniform(-MAX_TURN, MAX_TURN), pace * rng.uniform(-MAX_ZOOM, MAX_ZOOM)
        reach = self.patch / side  # grid_sample's unit is half a side of the source
        camera = np.zeros((length, 3, 3), np.float32)
        for frame in range(length):
            t = frame - length // 2
            factor = reach * math.exp(zoom * t)
            cos, sin = factor * math.cos(turn * t), factor * math.sin(turn * t)
            dx, dy = 2 * (shift * t + rng.normal(0, pace * MAX_SHAKE, 2)) / side
            camera[frame] = (cos, -sin, dx), (sin, cos, dy), (0, 0, 1)
        return PhotoWindow(index, y, x, *_sample_turn(rng), camera)

    def _cut_photo(self, window: PhotoWindow) -> Tensor:
        """(L, 3, patch, patch) float32, 0..1."""
        y, x = window.y, window.x
        image = self.photos[window.photo].segments[0, :, y : y + self.side, x : x + self.side]
        turned = _turned(image, window.mirrored, window.quarter_turns)
        return move_camera(turned, torch.from_numpy(window.camera[None]), self.patch)[0]


def batches_from(step: int, sampler: WindowSampler, size: int, length: int) -> Iterator[Tensor]:
    """The batches of ``step`` and all that follow, each prepared while the one before is trained on."""
    with ThreadPoolExecutor(1) as loader:
        pending = loader.submit(sampler.batch, step, size, length)
        for later in count(step + 1):
            batch = pending.result()
            pending = loader.submit(sampler.batch, later, size, length)
            yield batch


def move_camera(images: Tensor, cameras: Tensor, patch: int) -> Tensor:
    """What a virtual camera sees that moves over an image.

    Args:
        images: (N, 3, side, side) float32, 0..1.
        cameras: (N, L, 3, 3) float32, see ``PhotoWindow``.
        patch: hr pixels a side of the answer.

    Returns:
        (N, L, 3, patch, patch) float32, 0..1.
    """
    n, length = cameras.shape[:2]
    grid = F.affine_grid(cameras.flatten(0, 1)[:, :2], [n * length, 3, patch, patch], align_corners=False)
    sources = images[:, None].expand(-1, length, -1, -1, -1).flatten(0, 1)
    views = F.grid_sample(sources, grid, mode="bicubic", padding_mode="reflection", align_corners=False)
    return views.clamp(0, 1).unflatten(0, (n, length))


def _shares(weights: Sequence[float]) -> NDArray[np.float64]:
    return np.asarray(weights) / sum(weights)


def _sample_turn(rng: np.random.Generator) -> tuple[bool, int]:
    """Whether to mirror, and how many quarter turns."""
    return bool(rng.random() < 0.5), int(rng.integers(4))


def _turned(frames: NDArray[np.uint8], mirrored: bool, quarter_turns: int) -> Tensor:
    """(T, H, W, 3) -> (T, 3, H, W) float32, 0..1."""
    images = torch.from_numpy(np.array(frames)).permute(0, 3, 1, 2).float() / 255
    if mirrored:
        images = images.flip(-1)
    return torch.rot90(images, quarter_turns, (-2, -1))
