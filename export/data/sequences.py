"""Training sequences: scenes of video and moving photos, with cuts, flashes, stills and occluders.

All footage is decoded once, to uint8 files that are memory-mapped. Every crop is drawn from the seed and the
step alone, so that a resumed run sees what an uninterrupted one would.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from export.data.clips import PHOTO_SUFFIXES, VIDEO_SUFFIXES, cache_file, decode_frames, is_cut
from export.errors import ExportError

log = logging.getLogger(__name__)

SCENE_FRAMES = 300  # of one scene are kept: more of the same teaches little
MIN_FRAMES = 12
HR_CROP = (160, 256)  # or turned; the smallest clips of 640x360, halved, have 180 rows
CROP_TRIES = 3  # the sharpest of so many is taken: flat ones teach nothing
CUT_SHARE = 0.12  # of the sequences change to another one in the middle; half of these say so
FLASH_SHARE = 0.05  # become brighter or darker for one or two frames
FREEZE_SHARE = 0.08  # of the video sequences repeat frames, as a change of the frame rate does
SKIP_SHARE = 0.2  # take every second frame: larger motion
STILL_IMAGE_SHARE = 0.45  # of the sequences are made of photos and drawings under a moving camera
DRAWING_SHARE = 0.6  # of these: thin lines are unlearned without
STILL_SHARE = 0.2  # of the photo sequences: nothing moves
OCCLUDER_SHARE = 0.5
MAX_SHIFT = 10.0  # hr pixels per frame
SHAKE = 0.4  # standard deviation, hr pixels
MAX_TURN = math.radians(0.8)  # per frame
MAX_ZOOM = 0.008  # per frame

Frames = NDArray[np.uint8]


@dataclass(frozen=True)
class Scene:
    """One uncut piece of a clip, or a photo as a scene of one frame; memory-mapped."""

    clip: str
    frames: Frames
    """(T, H, W, 3) RGB."""
    weight: float


class Sequences(NamedTuple):
    """A batch."""

    hr: Tensor
    """(N, T, 3, H, W) float32, 0..1."""
    starts: Tensor
    """(N, T) float32: 1 where a sequence starts anew."""


def build_cache(clips: Path, cache: Path, leave_out: Sequence[str]) -> None:
    """Decode every clip into ``cache``, one file per scene; what is there already stays.

    Raises:
        ExportError: no clip could be used.
    """
    cache.mkdir(parents=True, exist_ok=True)
    used = 0
    for path in sorted(p for p in clips.iterdir() if p.suffix.lower() in VIDEO_SUFFIXES):
        if path.name in leave_out:
            continue
        index = cache / f"{path.name}.json"
        if not index.exists():
            try:
                sizes = _decode(path, cache)
            except ExportError as err:
                log.warning("skipped %s: %s", path.name, err)
                sizes = []
            index.write_text(json.dumps(sizes))
        used += bool(json.loads(index.read_text()))
    if not used:
        raise ExportError(f"expected clips in {clips}, found none that can be decoded")


def _decode(path: Path, cache: Path) -> list[int]:
    """Write the scenes of a clip; how many frames each has."""
    sizes: list[int] = []
    scene: list[Frames] = []

    def finish() -> None:
        if (
            len(scene) >= MIN_FRAMES
            and min(scene[0].shape[:2]) >= HR_CROP[0]
            and max(scene[0].shape[:2]) >= HR_CROP[1]
        ):
            kept = (
                scene[(len(scene) - SCENE_FRAMES) // 2 :][:SCENE_FRAMES]
                if len(scene) > SCENE_FRAMES
                else scene
            )
            with (
                cache_file(cache / f"{path.name}.{len(sizes)}.npy") as partial,
                partial.open("wb") as file,
            ):
                np.save(file, np.stack(kept))
            sizes.append(len(kept))
        scene.clear()

    for frame in decode_frames(path, lossless=False):
        if scene and (scene[-1].shape != frame.shape or is_cut(scene[-1], frame)):
            finish()
        scene.append(frame)
    finish()
    return sizes


def load_scenes(cache: Path, groups: dict[str, float]) -> list[Scene]:
    """Scenes of a cache; clips whose names start with a key of ``groups`` share at most that weight."""
    scenes: list[Scene] = []
    for path in sorted(cache.glob("*.npy")):
        clip = path.name.rsplit(".", 2)[0]
        frames = np.load(path, mmap_mode="r")
        scenes.append(Scene(clip, frames, math.sqrt(len(frames))))
    for prefix, share in groups.items():
        members = [i for i, s in enumerate(scenes) if s.clip.startswith(prefix)]
        rest = sum(s.weight for s in scenes if not s.clip.startswith(prefix))
        total = sum(scenes[i].weight for i in members)
        if total:
            factor = min(1.0, share / (1 - share) * rest / total)
            for i in members:
                scenes[i] = Scene(scenes[i].clip, scenes[i].frames, scenes[i].weight * factor)
    return scenes


def load_photos(folder: Path, cache: Path) -> list[Frames]:
    """(H, W, 3) photos, decoded once into ``cache``."""
    cache.mkdir(parents=True, exist_ok=True)
    photos = []
    for path in sorted(p for p in folder.iterdir() if p.suffix.lower() in PHOTO_SUFFIXES):
        stored = cache / f"{path.name}.npy"
        if not stored.exists():
            (frame,) = decode_frames(path, lossless=True)
            with cache_file(stored) as partial, partial.open("wb") as file:
                np.save(file, frame)
        photos.append(np.load(stored, mmap_mode="r"))
    return photos


class SequenceSampler:
    """Draws batches of sequences; the batch of a step is the same however often training was resumed."""

    def __init__(
        self, scenes: Sequence[Scene], photos: Sequence[Frames], drawings: Sequence[Frames] = (), *, seed: int
    ) -> None:
        self.scenes, self.photos, self.drawings, self.seed = scenes, photos, drawings, seed
        weights = np.array([scene.weight for scene in scenes], float)
        self.shares = weights / weights.sum() if len(scenes) else weights

    def batch(self, step: int, size: int, length: int) -> Sequences:
        """``size`` sequences of ``length`` frames, of one crop size."""
        rng = np.random.default_rng((self.seed, step))
        turned = bool(rng.random() < 0.5)
        hr, starts = zip(*(self._sequence(rng, length) for _ in range(size)), strict=True)
        frames = torch.stack(hr)
        if turned:
            frames = frames.transpose(-2, -1)
        return Sequences(frames.contiguous(), torch.stack(starts))

    def _sequence(self, rng: np.random.Generator, length: int) -> tuple[Tensor, Tensor]:
        starts = torch.zeros(length)
        starts[0] = 1
        frames = self._piece(rng, length)
        if rng.random() < CUT_SHARE:
            cut = int(rng.integers(1, length))
            frames = torch.cat((frames[:cut], self._piece(rng, length)[: length - cut]))
            starts[cut] = float(rng.random() < 0.5)
        if rng.random() < FLASH_SHARE:
            first = int(rng.integers(length))
            factor = float(np.exp(rng.uniform(-0.7, 0.7)))
            frames[first : first + int(rng.integers(1, 3))] *= factor
        return frames.clamp_(0, 1), starts

    def _piece(self, rng: np.random.Generator, length: int) -> Tensor:
        """(T, 3, H, W) float32, 0..1, mirrored or turned by a half at random."""
        photo = not self.scenes or (bool(self.photos) and rng.random() < STILL_IMAGE_SHARE)
        frames = self._photo(rng, length) if photo else self._video(rng, length)
        axes = [axis for axis in (-2, -1) if rng.random() < 0.5]
        return frames.flip(axes) if axes else frames

    def _video(self, rng: np.random.Generator, length: int) -> Tensor:
        scene = self.scenes[int(rng.choice(len(self.scenes), p=self.shares))].frames
        available, height, width = scene.shape[:3]
        crop = HR_CROP if height >= HR_CROP[0] and width >= HR_CROP[1] else HR_CROP[::-1]
        if min(height, width) >= HR_CROP[1] and rng.random() < 0.5:
            crop = HR_CROP[::-1]
        stride = 2 if rng.random() < SKIP_SHARE and available >= 2 * length else 1
        steps = np.arange(length) * stride
        if rng.random() < FREEZE_SHARE:
            repeats = rng.random(length) < 0.3
            steps = np.cumsum(np.where(repeats, 0, stride))
        first = int(rng.integers(max(1, available - int(steps[-1]))))
        steps = _reflected(first + steps, available)
        if rng.random() < 0.5:
            steps = steps[::-1]
        best, at = -1.0, (0, 0)
        for _ in range(CROP_TRIES):
            y, x = int(rng.integers(height - crop[0] + 1)), int(rng.integers(width - crop[1] + 1))
            green = scene[steps[length // 2], y : y + crop[0] : 2, x : x + crop[1] : 2, 1].astype(np.int16)
            sharp = sum(float(np.abs(np.diff(green, axis=axis)).mean()) for axis in (0, 1))
            if sharp > best:
                best, at = sharp, (y, x)
        y, x = at
        cut = np.stack([scene[t, y : y + crop[0], x : x + crop[1]] for t in steps])
        frames = torch.from_numpy(cut).permute(0, 3, 1, 2).float() / 255
        return frames if crop == HR_CROP else frames.transpose(-2, -1)

    def _photo(self, rng: np.random.Generator, length: int) -> Tensor:
        images = self.drawings if self.drawings and rng.random() < DRAWING_SHARE else self.photos
        ground = images[int(rng.integers(len(images)))]
        still = rng.random() < STILL_SHARE
        frames = _view(ground, _camera(rng, length, 0.0 if still else 1.0))
        if rng.random() < OCCLUDER_SHARE:
            other = self.photos[int(rng.integers(len(self.photos)))]
            frames = _occluded(frames, _view(other, _camera(rng, length, 1.0)), rng)
        return frames


def _reflected(steps: NDArray[np.int64], available: int) -> NDArray[np.int64]:
    """Indices beyond either end run back from there."""
    period = max(1, 2 * (available - 1))
    steps = np.mod(steps, period)
    return np.where(steps < available, steps, period - steps)


def _camera(rng: np.random.Generator, length: int, pace: float) -> NDArray[np.float32]:
    """(T, 2, 3): per frame, hr pixels: where a point of the view lies in the photo, from its center."""
    speed = MAX_SHIFT * rng.random() ** 2  # slow motion is commoner
    angle = rng.uniform(0, 2 * math.pi)
    shift = pace * speed * np.array((math.cos(angle), math.sin(angle)))
    bend = pace * rng.normal(0, 0.15, 2)  # pixels per frame and frame
    turn, zoom = pace * rng.uniform(-MAX_TURN, MAX_TURN), pace * rng.uniform(-MAX_ZOOM, MAX_ZOOM)
    shake = pace * SHAKE * rng.random()
    base = rng.uniform(0, 2 * math.pi) if rng.random() < 0.3 else 0.0
    start = rng.uniform(-80, 80, 2)
    camera = np.zeros((length, 2, 3), np.float32)
    for frame in range(length):
        t = frame - length // 2
        factor = math.exp(zoom * t)
        cos, sin = factor * math.cos(base + turn * t), factor * math.sin(base + turn * t)
        dx, dy = start + shift * t + bend * t * t / 2 + rng.normal(0, shake + 1e-9, 2)
        camera[frame] = (cos, -sin, dx), (sin, cos, dy)
    return camera


def _view(photo: Frames, camera: NDArray[np.float32]) -> Tensor:
    """(T, 3, H, W) float32, 0..1: what a camera sees of a photo; beyond its edges it is mirrored."""
    length = len(camera)
    height, width = photo.shape[:2]
    h, w = HR_CROP
    y, x = (torch.arange(side) + 0.5 - side / 2 for side in (h, w))
    points = torch.stack((*torch.meshgrid(x, y, indexing="xy"), torch.ones(h, w)), dim=-1)
    at = torch.einsum("tij,hwj->thwi", torch.from_numpy(camera), points)
    grid = 2 * at / torch.tensor([width, height], dtype=torch.float32)
    image = torch.from_numpy(np.array(photo)).permute(2, 0, 1).float()[None] / 255
    return F.grid_sample(
        image.expand(length, -1, -1, -1), grid, mode="bicubic", padding_mode="reflection", align_corners=False
    ).clamp(0, 1)


def _occluded(frames: Tensor, other: Tensor, rng: np.random.Generator) -> Tensor:
    """``other`` in front of ``frames``, where a moving ellipse or box is."""
    h, w = HR_CROP
    y, x = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
    box = rng.random() < 0.4
    radii = rng.uniform(15, 60, 2)
    at, speed = rng.uniform(0, 1, 2) * (w, h), rng.normal(0, 6, 2)
    angle = rng.uniform(0, math.pi)
    cos, sin = math.cos(angle), math.sin(angle)
    masks = []
    for t in range(len(frames)):
        cx, cy = at + speed * (t - len(frames) // 2)
        u, v = (cos * (x - cx) + sin * (y - cy)) / radii[0], (cos * (y - cy) - sin * (x - cx)) / radii[1]
        distance = torch.maximum(u.abs(), v.abs()) if box else (u * u + v * v).sqrt()
        masks.append(((1 - distance) * float(min(radii))).clamp(0, 1))  # an edge of one pixel
    mask = torch.stack(masks)[:, None]
    return frames + mask * (other - frames)
