"""Collages: whole frames side by side, and under each the same detail, enlarged."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

CROP: tuple[int, int] = (96, 144)  # (height, width) of the enlarged detail, hr pixels
CAPTION_PX = 28
COLUMN_PX = 640

Frame = NDArray[np.uint8]
"""(H, W, 3) RGB."""


def lossiest_crop(image: Frame, truth: Frame, where: NDArray[np.bool_] | None = None) -> tuple[int, int]:
    """Top left corner of the crop in which ``image`` is furthest from the truth.

    Args:
        image: compared with the truth.
        truth: of the same size.
        where: (H, W), the pixels that count; all of them if none does.
    """
    error = np.abs(image.astype(np.float64) - truth).mean(2)
    if where is not None and where.any():
        error *= where
    sums = np.pad(error, ((1, 0), (1, 0))).cumsum(0).cumsum(1)  # integral image
    h, w = CROP
    boxes = sums[h:, w:] - sums[:-h, w:] - sums[h:, :-w] + sums[:-h, :-w]
    top, left = np.unravel_index(boxes.argmax(), boxes.shape)
    return int(top), int(left)


def draw_collage(path: Path, corner: tuple[int, int], frames: Mapping[str, Frame]) -> None:
    """Write named frames of one size side by side, each over the detail at its top left ``corner``."""
    top, left = corner
    height, width = next(iter(frames.values())).shape[:2]
    frame_height, detail_height = height * COLUMN_PX // width, CROP[0] * COLUMN_PX // CROP[1]
    sheet = Image.new("RGB", (COLUMN_PX * len(frames), CAPTION_PX + frame_height + detail_height), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (name, frame) in enumerate(frames.items()):
        x = index * COLUMN_PX
        draw.text((x + 8, 4), name, "black", ImageFont.load_default(18))
        image = Image.fromarray(frame)
        detail = image.crop((left, top, left + CROP[1], top + CROP[0]))
        marked = image.copy()
        ImageDraw.Draw(marked).rectangle((left, top, left + CROP[1], top + CROP[0]), outline="red")
        sheet.paste(marked.resize((COLUMN_PX, frame_height), Image.Resampling.LANCZOS), (x, CAPTION_PX))
        # Nearest: the detail must show pixels, not another interpolation.
        sheet.paste(
            detail.resize((COLUMN_PX, detail_height), Image.Resampling.NEAREST),
            (x, CAPTION_PX + frame_height),
        )
    sheet.save(path)
