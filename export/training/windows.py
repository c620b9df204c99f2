"""Training windows: random crops of footage, augmented, with motion made up for photos."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from export.errors import ExportError
from export.spec import WINDOW
from export.training.degradations import bi
from export.training.footage import Clip

CROP_TRIES = 4  # the sharpest of so many is taken: flat ones teach nothing
PHOTO_MARGIN = 32  # hr pixels kept around a photo's crop for its made-up motion
MAX_SHIFT = 12.0  # hr pixels per frame
TRIPOD_SHARE = 0.3  # of the windows of photos have no motion, as much footage: one frame must do
MAX_SHAKE = 0.3  # standard deviation, hr pixels
MAX_TURN = math.radians(1.5)  # per frame
MAX_ZOOM = 0.015  # per frame
HELD_SHARE = 0.5  # of a GPU's free memory that footage may take; the rest is for training
SKIP_FRAME_SHARE = 0.25  # of the windows take every second frame: larger motion


downscale = bi


class Batch(NamedTuple):
    """Windows, and how the camera moved where that is known."""

    hr_windows: Tensor
    """(N, L, 3, H, W) float32 RGB, 0..1: L consecutive frames, three unless more were asked for."""
    motion: Tensor
    """(N, 2 (L - 2), 2, 3) float32: for each frame but the first and the last, per neighbour, the affine map
    of a point of the frame to where it lies in the neighbour; (x, y) run from -1 to 1 between the frame's
    edges. NaN where unknown."""


def windowed(frames: Tensor, motion: Tensor) -> Batch:
    """The windows of longer crops, those of a crop in a row.

    Args:
        frames: (N, L, 3, h, w), of any resolution.
        motion: (N, 2 (L - 2), 2, 3), see ``Batch``.

    Returns:
        (N (L - 2), 3, 3, h, w) frames t-1, t, t+1, and their (N (L - 2), 2, 2, 3) motion.
    """
    windows = [frames[:, t : t + WINDOW] for t in range(frames.shape[1] - WINDOW + 1)]
    return Batch(torch.stack(windows, 1).flatten(0, 1), motion.reshape(-1, WINDOW - 1, 2, 3))


class _ClipWindow(NamedTuple):
    """Where a window is cut from a clip, and how it is augmented."""

    clip: int
    segment: int
    times: slice
    y: int
    x: int
    mirrored: bool
    quarter_turns: int
    reversed: bool


class _PhotoWindow(NamedTuple):
    """Where a window is cut from a photo, and how a virtual camera moves over it."""

    photo: int
    side: int
    y: int
    x: int
    mirrored: bool
    quarter_turns: int
    camera: Tensor
    """(L, 3, 3) float32: per frame the affine map of its points to where they lie in the cut-out."""


class WindowSampler:
    """Draws batches of hr windows; batch ``step`` is the same however often training was resumed.

    What is drawn does not depend on the device; only where it is cut out does.
    """

    def __init__(
        self,
        clips: Sequence[Clip],
        photos: Sequence[Clip],
        *,
        patch: int,
        photo_share: float,
        seed: int,
        device: torch.device | None = None,
    ) -> None:
        """Sample ``patch`` x ``patch`` hr crops; ``photo_share`` of them from ``photos``.

        Args:
            clips: footage.
            photos: still images, may be empty.
            patch: hr pixels a side.
            photo_share: of the windows, drawn from ``photos`` if there are any.
            seed: with the step, decides a batch.
            device: hold all footage there as uint8 and give batches there, so that the device waits neither
                for the disk nor for the host. By default footage stays on disk and batches are on the CPU.

        Raises:
            ExportError: the footage does not fit into the memory of ``device``.
        """
        self.clips, self.photos = clips, photos
        self.patch, self.seed = patch, seed
        self.photo_share = photo_share if photos else 0.0
        # Long clips hold more, but not in proportion: their frames resemble each other.
        weights = np.sqrt([clip.segments.shape[0] for clip in clips])
        self.weights = weights / weights.sum()
        self.device = device or torch.device("cpu")
        self.held: dict[str, list[Tensor]] = {}
        if device:
            _require_room([*clips, *photos], device)
            self.held = {
                kind: [torch.from_numpy(np.array(source.segments)).to(device) for source in sources]
                for kind, sources in (("clips", clips), ("photos", photos))
            }

    def batch(self, step: int, size: int, length: int = WINDOW) -> Batch:
        """The batch of a step, on the sampler's device.

        Args:
            step: with the seed, decides what is drawn.
            size: crops.
            length: consecutive frames of each, 3 to 7.
        """
        rng = np.random.default_rng((self.seed, step))
        drawn = [
            self._draw_photo(rng, length) if rng.random() < self.photo_share else self._draw_clip(rng, length)
            for _ in range(size)
        ]
        windows: list[Tensor | None] = [None] * size
        inner = range(1, length - 1)
        motion = torch.full((size, 2 * len(inner), 2, 3), torch.nan)
        # Photos of a batch are moved together: on a GPU a call costs more than its arithmetic.
        by_side: dict[int, list[int]] = {}
        for index, window in enumerate(drawn):
            if isinstance(window, _ClipWindow):
                windows[index] = self._cut_clip(window)
            else:
                by_side.setdefault(window.side, []).append(index)
                camera = window.camera
                maps = [torch.linalg.inv(camera[t - 1 : t + 2 : 2]) @ camera[t] for t in inner]
                motion[index] = torch.cat(maps)[:, :2]
        for indices in by_side.values():
            moved = self._move_photos([p for p in (drawn[i] for i in indices) if isinstance(p, _PhotoWindow)])
            for index, window_frames in zip(indices, moved, strict=True):
                windows[index] = window_frames
        return Batch(torch.stack([w for w in windows if w is not None]), motion.to(self.device))

    def _draw_clip(self, rng: np.random.Generator, length: int) -> _ClipWindow:
        index = int(rng.choice(len(self.clips), p=self.weights))
        segments = self.clips[index].segments
        count, available, height, width, _ = segments.shape
        stride = 2 if rng.random() < SKIP_FRAME_SHARE and available > 2 * (length - 1) else 1
        crops = []
        for _ in range(CROP_TRIES):
            segment = int(rng.integers(count))
            first = int(rng.integers(available - stride * (length - 1)))
            y, x = int(rng.integers(height - self.patch + 1)), int(rng.integers(width - self.patch + 1))
            # On the host whatever the device, or every crop would wait for it; a quarter tells as much.
            centre = segments[segment, first + stride * (length // 2)]
            green = centre[y : y + self.patch : 2, x : x + self.patch : 2, 1].astype(np.int16)
            sharpness = sum(float(np.abs(np.diff(green, axis=axis)).mean()) for axis in (0, 1))
            crops.append((sharpness, segment, first, y, x))
        _, segment, first, y, x = max(crops)
        times = slice(first, first + stride * (length - 1) + 1, stride)
        mirrored, quarter_turns = _draw_turn(rng)
        return _ClipWindow(index, segment, times, y, x, mirrored, quarter_turns, bool(rng.random() < 0.5))

    def _cut_clip(self, drawn: _ClipWindow) -> Tensor:
        """(L, 3, patch, patch) float32, 0..1."""
        area = (
            drawn.segment,
            drawn.times,
            slice(drawn.y, drawn.y + self.patch),
            slice(drawn.x, drawn.x + self.patch),
        )
        if self.held:
            frames = self.held["clips"][drawn.clip][area]
        else:
            frames = torch.from_numpy(np.array(self.clips[drawn.clip].segments[area]))
        window = _turned(frames, drawn.mirrored, drawn.quarter_turns)
        return window.flip(0) if drawn.reversed else window

    def _draw_photo(self, rng: np.random.Generator, length: int) -> _PhotoWindow:
        """Move a virtual camera over a photo, if it moves: a steady shift, turn and zoom, and some shake."""
        index = int(rng.integers(len(self.photos)))
        height, width = self.photos[index].segments.shape[2:4]
        side = min(self.patch + 2 * PHOTO_MARGIN, height, width)
        y, x = (int(rng.integers(full - side + 1)) for full in (height, width))
        pace = float(rng.random() >= TRIPOD_SHARE)
        shift = pace * rng.uniform(-MAX_SHIFT, MAX_SHIFT, 2)
        turn, zoom = pace * rng.uniform(-MAX_TURN, MAX_TURN), pace * rng.uniform(-MAX_ZOOM, MAX_ZOOM)
        reach = self.patch / side  # grid_sample's unit is half a side of the source
        camera = torch.zeros(length, 3, 3)
        for frame in range(length):
            t = frame - length // 2
            factor = reach * math.exp(zoom * t)
            cos, sin = factor * math.cos(turn * t), factor * math.sin(turn * t)
            dx, dy = 2 * (shift * t + rng.normal(0, pace * MAX_SHAKE, 2)) / side
            camera[frame] = torch.tensor([[cos, -sin, dx], [sin, cos, dy], [0, 0, 1]])
        return _PhotoWindow(index, side, y, x, *_draw_turn(rng), camera)

    def _move_photos(self, drawn: Sequence[_PhotoWindow]) -> Tensor:
        """(N, L, 3, patch, patch) float32, 0..1, of photo windows of one side."""
        length = len(drawn[0].camera)
        sources = []
        for photo in drawn:
            area = (0, 0, slice(photo.y, photo.y + photo.side), slice(photo.x, photo.x + photo.side))
            if self.held:
                image = self.held["photos"][photo.photo][area]
            else:
                image = torch.from_numpy(np.array(self.photos[photo.photo].segments[area]))
            sources.append(
                _turned(image[None], photo.mirrored, photo.quarter_turns).expand(length, -1, -1, -1)
            )
        cameras = torch.cat([photo.camera[:, :2] for photo in drawn]).to(self.device)
        grid = F.affine_grid(cameras, [len(cameras), 3, self.patch, self.patch], align_corners=False)
        moved = F.grid_sample(
            torch.cat(sources), grid, mode="bicubic", padding_mode="reflection", align_corners=False
        )
        return moved.clamp(0, 1).unflatten(0, (len(drawn), length))


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


def _draw_turn(rng: np.random.Generator) -> tuple[bool, int]:
    """Whether to mirror, and how many quarter turns."""
    return bool(rng.random() < 0.5), int(rng.integers(4))


def _turned(frames: Tensor, mirrored: bool, quarter_turns: int) -> Tensor:
    """(T, H, W, 3) uint8 -> (T, 3, H, W) float32, 0..1."""
    images = frames.permute(0, 3, 1, 2).float() / 255
    if mirrored:
        images = images.flip(-1)
    return torch.rot90(images, quarter_turns, (-2, -1))
