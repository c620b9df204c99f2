"""Synthetic line art to train on: lines, grids, letters and plain shapes, sharper than most video has them.

Reduced by four, thin lines a few pixels apart alias to a pattern of bright and dark. A network that was
trained on many of them restores lines; one that was not, blobs.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from export.data.clips import Clip, cache_file

log = logging.getLogger(__name__)

SHARE = 0.6  # of photo windows, if there are photos too; with 0.4 trained networks lost thin lines again
SIDE = 512  # hr pixels
OVERSAMPLING = 4  # drawn larger by this, then averaged: smooth edges
CANVAS = SIDE * OVERSAMPLING
MAX_LAYERS = 2
MIN_CONTRAST = 40.0  # gray levels between a layer and the ground
PITCH = 8.0, 32.0  # hr pixels from line to line: from where an lr frame begins to tell them apart
STROKE = 1.0, 6.0  # hr pixels
WAVES = 60.0, 400.0  # hr pixels of length
LETTERS = 8.0, 32.0  # hr pixels of height
MAX_SOFTNESS = 0.8  # hr pixels, standard deviation: a lens
MAX_TILT = 0.25  # how far perspective moves a corner, over the side
GLYPHS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789     .,:;-+()?!&%/"

Color = tuple[int, int, int]
Motif = Callable[[ImageDraw.ImageDraw, np.random.Generator], None]


def draw_all(count: int, cache: Path, photos: int = 0) -> list[Clip]:
    """Drawings, always the same ones, in the form of photos.

    Args:
        count: of drawings. A network overfits to few: one of 0.3 M parameters gained 2 dB more on the 256 it
            was trained on than on others.
        cache: folder where they are kept, as decoded clips are.
        photos: number of photos they are mixed with, see ``SHARE``.
    """
    if not count:
        return []
    # The code is part of the key: other code draws other pictures.
    stored = cache / f"drawings-{count}-{hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]}.npy"
    if not stored.exists():
        log.info("drawing %d pictures", count)
        with cache_file(stored) as partial, ThreadPoolExecutor() as pool:
            pictures = np.lib.format.open_memmap(partial, "w+", np.uint8, (count, SIDE, SIDE, 3))
            for index, picture in enumerate(pool.map(draw, range(count))):
                pictures[index] = picture
            pictures.flush()
    weight = SHARE / (1 - SHARE) * photos / count if photos else 1.0
    pictures = np.load(stored, mmap_mode="r")
    return [Clip(f"drawing {index}", picture[None, None], weight) for index, picture in enumerate(pictures)]


def draw(seed: int) -> NDArray[np.uint8]:
    """(SIDE, SIDE, 3) RGB."""
    rng = np.random.default_rng((0, seed))
    ground = _color(rng)
    corners = np.clip(rng.normal(ground, 20, (2, 2, 3)), 0, 255).astype(np.uint8)
    image = Image.fromarray(corners).resize((CANVAS, CANVAS), Image.Resampling.BILINEAR)
    for _ in range(rng.integers(1, MAX_LAYERS + 1)):
        mask = Image.new("L", (CANVAS, CANVAS))
        MOTIFS[rng.integers(len(MOTIFS))](ImageDraw.Draw(mask), rng)
        mask = mask.transform(
            mask.size, Image.Transform.PERSPECTIVE, _perspective(rng), Image.Resampling.BILINEAR
        )
        image.paste(_color(rng, unlike=ground), mask=mask)
    image = image.reduce(OVERSAMPLING).filter(ImageFilter.GaussianBlur(rng.uniform(0, MAX_SOFTNESS)))
    return np.asarray(image)


def _color(rng: np.random.Generator, unlike: Color | None = None) -> Color:
    """Any color, often nearly gray; at least ``MIN_CONTRAST`` brighter or darker than ``unlike``."""
    while True:
        drawn = rng.uniform(0, 255) + rng.uniform(0, 1) * rng.uniform(-128, 128, 3)
        red, green, blue = np.clip(drawn, 0, 255).astype(int).tolist()
        if unlike is None or abs(red + green + blue - sum(unlike)) > 3 * MIN_CONTRAST:
            return red, green, blue


def _perspective(rng: np.random.Generator) -> Sequence[float]:
    """Coefficients that turn, enlarge and tilt a canvas, as Pillow takes them: from answer to source."""
    angle, zoom = rng.uniform(0, 2 * np.pi), rng.uniform(1, 1.5)
    corners = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)], float)
    turn = np.array([(np.cos(angle), -np.sin(angle)), (np.sin(angle), np.cos(angle))])
    moved = zoom * corners @ turn + rng.uniform(-MAX_TILT, MAX_TILT, (4, 2))
    to, source = ((1 + points) * CANVAS / 2 for points in (moved, corners))
    equations = [
        row
        for (x, y), (u, v) in zip(to, source, strict=True)
        for row in ((x, y, 1, 0, 0, 0, -u * x, -u * y), (0, 0, 0, x, y, 1, -v * x, -v * y))
    ]
    return np.linalg.solve(np.array(equations), source.flatten()).tolist()


def _between(rng: np.random.Generator, least: float, most: float) -> int:
    """Pixels of the canvas, log-uniform between hr pixels."""
    return round(OVERSAMPLING * float(np.exp(rng.uniform(np.log(least), np.log(most)))))


def _lines(pen: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    """Parallel lines, straight or in waves, in one direction or two; every so many a heavier one."""
    pitch = _between(rng, *PITCH)
    stroke = min(_between(rng, *STROKE), pitch // 2)
    heavy = int(rng.integers(2, 12))
    extra = int(rng.integers(0, stroke + 1)) if rng.random() < 0.5 else 0
    is_crossed, is_wavy = rng.random(2) < (0.7, 0.3)
    along = np.linspace(0, CANVAS, 65)
    height = pitch * rng.uniform(0.2, 2) if is_wavy else 0.0
    wave = height * np.sin(2 * np.pi * along / _between(rng, *WAVES) + rng.uniform(0, 2 * np.pi))
    for index, at in enumerate(range(0, CANVAS, pitch)):
        width = stroke + (0 if index % heavy else extra)
        points = np.stack((along, at + wave), axis=1)
        pen.line(points.flatten().tolist(), 255, width)
        if is_crossed:
            pen.line(points[:, ::-1].flatten().tolist(), 255, width)


def _rectangles(pen: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    """Rows of equal rectangles: bricks, windows, a chessboard."""
    across, down = _between(rng, *PITCH), _between(rng, *PITCH)
    width, height = (max(OVERSAMPLING, round(side * rng.uniform(0.3, 0.9))) for side in (across, down))
    shift = across // 2 if rng.random() < 0.5 else 0
    for row, top in enumerate(range(0, CANVAS, down)):
        for left in range(-shift * (row % 2), CANVAS, across):
            pen.rectangle((left, top, left + width, top + height), 255)


def _letters(pen: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    """Lines of letters."""
    size = _between(rng, *LETTERS)
    font = ImageFont.load_default(size)
    for top in range(0, CANVAS, round(size * rng.uniform(1.1, 2))):
        text = "".join(rng.choice(list(GLYPHS), 2 * CANVAS // size))
        pen.text((0, top), text, 255, font)


def _shapes(pen: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    """Outlines and areas: ellipses, polygons, broken lines."""
    for _ in range(rng.integers(3, 30)):
        stroke = _between(rng, *STROKE)
        x, y = rng.integers(CANVAS, size=2).tolist()
        reach = _between(rng, 8, 120)
        points = [(x + dx, y + dy) for dx, dy in rng.integers(-reach, reach + 1, (4, 2)).tolist()]
        kind = rng.integers(4)
        if kind == 0:
            pen.polygon(points, 255)
        elif kind == 1:
            pen.line(points, 255, stroke, joint="curve")
        elif kind == 2:
            pen.ellipse((x - reach, y - reach, x + reach, y + reach), outline=255, width=stroke)
        else:
            pen.ellipse((x - reach, y - reach // 2, x + reach, y + reach // 2), 255)


MOTIFS: Sequence[Motif] = (_lines, _lines, _lines, _rectangles, _letters, _shapes)
