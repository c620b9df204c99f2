"""Which side of a picture is up: FFmpeg's display matrix of videos, EXIF's orientation of still images."""

from __future__ import annotations

import math
import struct
from typing import cast

import av
import numpy as np
from av.sidedata.sidedata import SideData

from ..frames.windows import Image

UPRIGHT = 1
# EXIF 2.3, tag Orientation: quarter turns counterclockwise that put a stored image upright, and whether it is
# mirrored, left to right, after that.
TURNS = {
    1: (0, False),
    2: (0, True),
    3: (2, False),
    4: (2, True),
    5: (3, True),
    6: (3, False),
    7: (1, True),
    8: (1, False),
}

ONE, ONE_OF_LAST_COLUMN = 1 << 16, 1 << 30  # of the matrix, in fixed point
# Their decoders attach side data with a name, which PyAV frees twice: the process would die.
UNSAFE_SIDE_DATA = frozenset(("png", "apng"))


def upright(image: Image, orientation: int) -> Image:
    """Turn and mirror an (H, W, 3) image as its EXIF orientation says."""
    if orientation == UPRIGHT:
        return image
    turns, is_mirrored = TURNS[orientation]
    turned = np.rot90(image, turns)
    return np.ascontiguousarray(turned[:, ::-1] if is_mirrored else turned)


def is_sideways(orientation: int) -> bool:
    """Whether an upright image has the sides of the stored one exchanged."""
    return TURNS[orientation][0] % 2 == 1


def display_matrix(frame: av.VideoFrame, codec: str) -> tuple[int, ...] | None:
    """FFmpeg's nine integers that rotate and flip a frame on display."""
    if codec not in UNSAFE_SIDE_DATA:
        try:
            matrix = frame.side_data.get("DISPLAYMATRIX")
        except ValueError:  # beside it is data of a kind that PyAV has no name for
            pass
        else:
            return struct.unpack("=9i", bytes(cast(SideData, matrix))) if matrix else None
    if not frame.rotation:
        return None
    angle = math.radians(-frame.rotation)
    cosine, sine = round(math.cos(angle) * ONE), round(math.sin(angle) * ONE)
    return (cosine, sine, 0, -sine, cosine, 0, 0, 0, ONE_OF_LAST_COLUMN)
