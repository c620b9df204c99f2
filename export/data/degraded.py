"""Scenes of still images, and lr frames of every scene of a cache: made once, before a training run."""

from __future__ import annotations

import logging
import os
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from export.data.clips import save_array
from export.data.degradations import degrade
from export.data.moving_photos import moving_photo
from export.spec import SCALE

log = logging.getLogger(__name__)

PHOTO_SIZE = (320, 512)  # hr pixels of a rendered photo sequence: codecs need more than a crop
PHOTO_FRAMES = 24

Frames = NDArray[np.uint8]


def lr_files(scene: Path, folder: Path, variants: int) -> dict[str, Path]:
    """Name of a degradation, ``bi`` or ``real0``, -> file of a scene's lr frames; ``bi`` first."""
    names = ("bi", *(f"real{variant}" for variant in range(variants)))
    return {name: folder / f"{scene.stem}.{name}.npy" for name in names}


def degrade_scenes(cache: Path, out: Path, variants: int) -> None:
    """Write lr frames of every scene of a cache; what is there already stays.

    Each scene gets ``SCENE.bi.npy``, and ``variants`` of ``SCENE.real0.npy``; the name decides what happens
    to it.

    Args:
        cache: scenes, one .npy file each, (T, H, W, 3) uint8 RGB.
        out: folder for lr frames, (T, H // 4, W // 4, 3) uint8 RGB.
        variants: as cameras and codecs make them, see `export.data.real`.
    """
    out.mkdir(parents=True, exist_ok=True)
    scenes = sorted(cache.glob("*.npy"))
    jobs = [
        (scene, target, name.rstrip("0123456789"))
        for scene in scenes
        for name, target in lr_files(scene, out, variants).items()
        if not target.exists()
    ]
    if jobs:
        log.info("degrading %d scenes in %d ways", len(scenes), 1 + variants)
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # codecs and torch release the interpreter's lock
            list(pool.map(_degrade_scene, *zip(*jobs, strict=True)))


def _degrade_scene(scene: Path, target: Path, name: str) -> None:
    frames = np.load(scene, mmap_mode="r")
    h, w = (side // SCALE * SCALE for side in frames.shape[1:3])
    save_array(target, degrade(name, frames[:, :h, :w], zlib.crc32(target.stem.encode())))


def render_photos(photos: Sequence[Frames], drawings: Sequence[Frames], out: Path, count: int) -> None:
    """Write ``count`` sequences of moving photos and drawings as scenes; what is there already stays."""
    out.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        target = out / f"photo.{index}.npy"
        if not target.exists():
            rng = np.random.default_rng(index)
            frames = moving_photo(rng, photos, drawings, PHOTO_FRAMES, PHOTO_SIZE)
            save_array(target, (frames * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy())
