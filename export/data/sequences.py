"""Training sequences: scenes of video and of moving photos, with cuts, flashes, stills and occluders.

All footage is decoded and reduced once, to uint8 files that are memory-mapped. Every crop is drawn from the
seed and the step alone, so that a resumed run sees what an uninterrupted one would.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.data.clips import PHOTO_SUFFIXES, VIDEO_SUFFIXES, decode_frames, is_cut, save_array
from export.data.degraded import lr_files
from export.errors import ExportError
from export.spec import SCALE

log = logging.getLogger(__name__)

SCENE_FRAMES = 300  # of one scene are kept: more of the same teaches little
MIN_FRAMES = 12
HR_CROP = (160, 256)  # or turned; the smallest clips of 640x360, halved, have 180 rows
CROP_TRIES = 3  # the sharpest of so many is taken: flat ones teach nothing
CUT_SHARE = 0.12  # of the sequences change to another one in the middle; half of these say so
FLASH_SHARE = 0.05  # become brighter or darker for one or two frames
FREEZE_SHARE = 0.08  # of the video sequences repeat frames, as a change of the frame rate does
SKIP_SHARE = 0.2  # take every second frame: larger motion
CLEAN_SHARE = 0.15  # of the sequences with degraded frames are reduced by plain bicubic all the same
STILL_IMAGE_SHARE = 0.45  # of the sequences are made of photos and drawings under a moving camera

Frames = NDArray[np.uint8]


@dataclass(frozen=True)
class Scene:
    """One uncut piece of a clip; memory-mapped."""

    clip: str
    frames: Frames
    """(T, H, W, 3) RGB."""
    weight: float
    lr: tuple[Frames, ...]
    """(T, H // 4, W // 4, 3) RGB each: by ``bi``; then, if any, as cameras and codecs make them."""


class Sequences(NamedTuple):
    """A batch."""

    hr: Tensor
    """(N, T, 3, H, W) float32, 0..1."""
    lr: Tensor
    """(N, T, 3, H/4, W/4) float32, 0..1, multiples of 1/255."""
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
            save_array(cache / f"{path.name}.{len(sizes)}.npy", np.stack(kept))
            sizes.append(len(kept))
        scene.clear()

    for frame in decode_frames(path, lossless=False):
        if scene and (scene[-1].shape != frame.shape or is_cut(scene[-1], frame)):
            finish()
        scene.append(frame)
    finish()
    return sizes


def load_scenes(cache: Path, lr: Path, groups: dict[str, float], variants: int = 0) -> list[Scene]:
    """Scenes of a cache; clips whose names start with a key of ``groups`` share at most that weight.

    Args:
        cache: see `build_cache`.
        lr: folder of their lr frames, see `export.data.degraded`.
        groups: shares by prefix.
        variants: how many sets of lr frames are used besides ``bi``'s.
    """
    scenes: list[Scene] = []
    for path in sorted(cache.glob("*.npy")):
        clip = path.name.rsplit(".", 2)[0]
        frames = np.load(path, mmap_mode="r")
        reduced = tuple(np.load(file, mmap_mode="r") for file in lr_files(path, lr, variants).values())
        scenes.append(Scene(clip, frames, math.sqrt(len(frames)), reduced))
    for prefix, share in groups.items():
        members = [i for i, s in enumerate(scenes) if s.clip.startswith(prefix)]
        rest = sum(s.weight for s in scenes if not s.clip.startswith(prefix))
        total = sum(scenes[i].weight for i in members)
        if total:
            factor = min(1.0, share / (1 - share) * rest / total)
            for i in members:
                scenes[i] = replace(scenes[i], weight=scenes[i].weight * factor)
    return scenes


def share_scenes(footage: Sequence[Scene], rendered: Sequence[Scene]) -> list[Scene]:
    """Scenes of both kinds, of which ``rendered`` have ``STILL_IMAGE_SHARE``."""
    odds = STILL_IMAGE_SHARE / (1 - STILL_IMAGE_SHARE)
    factor = odds * sum(s.weight for s in footage) / sum(s.weight for s in rendered)
    return [*footage, *(replace(s, weight=s.weight * factor) for s in rendered)]


def load_photos(folder: Path, cache: Path) -> list[Frames]:
    """(H, W, 3) photos, decoded once into ``cache``."""
    cache.mkdir(parents=True, exist_ok=True)
    photos = []
    for path in sorted(p for p in folder.iterdir() if p.suffix.lower() in PHOTO_SUFFIXES):
        stored = cache / f"{path.name}.npy"
        if not stored.exists():
            (frame,) = decode_frames(path, lossless=True)
            save_array(stored, frame)
        photos.append(np.load(stored, mmap_mode="r"))
    return photos


class SequenceSampler:
    """Draws batches of sequences; the batch of a step is the same however often training was resumed."""

    def __init__(self, scenes: Sequence[Scene], *, seed: int) -> None:
        self.scenes, self.seed = scenes, seed
        weights = np.array([scene.weight for scene in scenes], float)
        self.shares = weights / weights.sum()

    def batch(self, step: int, size: int, length: int) -> Sequences:
        """``size`` sequences of ``length`` frames, of one crop size."""
        rng = np.random.default_rng((self.seed, step))
        turned = bool(rng.random() < 0.5)
        sequences = [self._sequence(rng, length) for _ in range(size)]
        hr, lr, starts = (torch.stack(tensors) for tensors in zip(*sequences, strict=True))
        if turned:
            hr, lr = hr.transpose(-2, -1), lr.transpose(-2, -1)
        return Sequences(hr.contiguous(), lr.contiguous(), starts)

    def _sequence(self, rng: np.random.Generator, length: int) -> Sequences:
        """Without the first dimension."""
        starts = torch.zeros(length)
        starts[0] = 1
        hr, lr = self._piece(rng, length)
        if rng.random() < CUT_SHARE:
            cut = int(rng.integers(1, length))
            hr, lr = (
                torch.cat((old[:cut], new[: length - cut]))
                for old, new in zip((hr, lr), self._piece(rng, length), strict=True)
            )
            starts[cut] = float(rng.random() < 0.5)
        if rng.random() < FLASH_SHARE:
            first = int(rng.integers(length))
            factor = float(np.exp(rng.uniform(-0.7, 0.7)))
            flash = slice(first, first + int(rng.integers(1, 3)))
            hr[flash] *= factor
            lr[flash] = (lr[flash] * factor * 255).round() / 255
        return Sequences(hr.clamp_(0, 1), lr.clamp_(0, 1), starts)

    def _piece(self, rng: np.random.Generator, length: int) -> tuple[Tensor, Tensor]:
        """Hr and lr frames, mirrored or turned by a half at random."""
        hr, lr = self._crop(rng, length)
        axes = [axis for axis in (-2, -1) if rng.random() < 0.5]
        return (hr.flip(axes), lr.flip(axes)) if axes else (hr, lr)

    def _crop(self, rng: np.random.Generator, length: int) -> tuple[Tensor, Tensor]:
        chosen = self.scenes[int(rng.choice(len(self.scenes), p=self.shares))]
        scene = chosen.frames
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
            y, x = (
                SCALE * int(rng.integers((side - part) // SCALE + 1))
                for side, part in zip((height, width), crop, strict=True)
            )
            green = scene[steps[length // 2], y : y + crop[0] : 2, x : x + crop[1] : 2, 1].astype(np.int16)
            sharp = sum(float(np.abs(np.diff(green, axis=axis)).mean()) for axis in (0, 1))
            if sharp > best:
                best, at = sharp, (y, x)
        hr = _cut(scene, steps, at, crop)
        variant = 0
        if len(chosen.lr) > 1 and rng.random() >= CLEAN_SHARE:
            variant = int(rng.integers(1, len(chosen.lr)))
        at_lr, crop_lr = (at[0] // SCALE, at[1] // SCALE), (crop[0] // SCALE, crop[1] // SCALE)
        lr = _cut(chosen.lr[variant], steps, at_lr, crop_lr)
        return (hr, lr) if crop == HR_CROP else (hr.transpose(-2, -1), lr.transpose(-2, -1))


def _cut(frames: Frames, steps: NDArray[np.int64], at: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """(T, 3, *size) float32, 0..1."""
    (y, x), (height, width) = at, size
    cut = np.stack([frames[t, y : y + height, x : x + width] for t in steps])
    return torch.from_numpy(cut).permute(0, 3, 1, 2).float() / 255


def _reflected(steps: NDArray[np.int64], available: int) -> NDArray[np.int64]:
    """Indices beyond either end run back from there."""
    period = max(1, 2 * (available - 1))
    steps = np.mod(steps, period)
    return np.where(steps < available, steps, period - steps)
