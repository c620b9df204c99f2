"""Sequences from still images: a camera that moves over a photo or a drawing, perhaps behind an occluder."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

DRAWING_SHARE = 0.6  # of these: thin lines are unlearned without
STILL_SHARE = 0.2  # of the photo sequences: nothing moves
OCCLUDER_SHARE = 0.5
MAX_SHIFT = 10.0  # hr pixels per frame
SHAKE = 0.4  # standard deviation, hr pixels
MAX_TURN = math.radians(0.8)  # per frame
MAX_ZOOM = 0.008  # per frame

Photo = NDArray[np.uint8]
"""(H, W, 3) RGB."""


def moving_photo(
    rng: np.random.Generator,
    photos: Sequence[Photo],
    drawings: Sequence[Photo],
    length: int,
    size: tuple[int, int],
) -> Tensor:
    """A sequence of one still image.

    Args:
        rng: source of everything random.
        photos: what a camera moves over, and what moves in front of it.
        drawings: likewise, but never in front; may be empty.
        length: frames.
        size: their height and width.

    Returns:
        (length, 3, *size) float32, 0..1.
    """
    images = drawings if drawings and rng.random() < DRAWING_SHARE else photos
    ground = images[int(rng.integers(len(images)))]
    still = rng.random() < STILL_SHARE
    frames = _view(ground, _camera(rng, length, 0.0 if still else 1.0), size)
    if rng.random() < OCCLUDER_SHARE:
        other = photos[int(rng.integers(len(photos)))]
        frames = _occluded(frames, _view(other, _camera(rng, length, 1.0), size), rng)
    return frames


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


def _view(photo: Photo, camera: NDArray[np.float32], size: tuple[int, int]) -> Tensor:
    """(T, 3, H, W) float32, 0..1: what a camera sees of a photo; beyond its edges it is mirrored."""
    length = len(camera)
    height, width = photo.shape[:2]
    h, w = size
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
    h, w = frames.shape[-2:]
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
