"""What a still image says of itself beside pixels: which side is up, its color profile, EXIF."""

from __future__ import annotations

import logging
import struct
import warnings
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image as Pillow

from ..frames.windows import Size
from .orientation import TURNS, UPRIGHT

log = logging.getLogger(__name__)

ORIENTATION, EXIF_IFD, TIFF_WIDTH, TIFF_HEIGHT = 0x0112, 0x8769, 0x0100, 0x0101
SIZE_TAGS = (0xA002, 0xA003)  # of the image as it was

PNG_START_BYTES = 8 + 25  # signature and header chunk, after which other chunks may follow
PROFILE_SPACE, PROFILE_RGB = slice(16, 20), b"RGB "


@dataclass(frozen=True)
class StillTags:
    """An image's size, and what a PNG file can hold of its own tags."""

    orientation: int = UPRIGHT
    """EXIF's, 1 to 8."""
    icc_profile: bytes = b""
    size: Size | None = None
    """(height, width) as it is stored; None: unknown."""
    exif: bytes = b""
    """As a TIFF structure, without orientation and size: the output is upright and has its own."""

    def in_png(self, png: bytes) -> bytes:
        """Add them to a PNG file that has neither."""
        chunks = b""
        if self.icc_profile:
            chunks += _chunk(b"iCCP", b"ICC profile\0\0" + zlib.compress(self.icc_profile))
        if self.exif:
            chunks += _chunk(b"eXIf", self.exif)
        return png[:PNG_START_BYTES] + chunks + png[PNG_START_BYTES:]


def count_images(path: Path) -> int:
    """How many images a file has by Pillow, which knows more pages and animations than FFmpeg; 1: unknown."""
    try:
        with Pillow.open(path) as image:
            return int(getattr(image, "n_frames", 1))
    except Exception:  # whatever Pillow makes of an image that FFmpeg may still decode
        return 1


@cache
def tags_of(path: Path) -> StillTags:
    """Read an image's tags; what cannot be read or kept is said and left out."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # as Pillow tells of broken tags
            with Pillow.open(path) as image:
                profile = image.info.get("icc_profile") or b""
                exif = image.getexif()
                orientation = exif.pop(ORIENTATION, UPRIGHT)
                details = exif.get_ifd(EXIF_IFD)
                for tag in SIZE_TAGS:
                    details.pop(tag, None)
                size = image.height, image.width
                if image.format == "TIFF":  # Pillow turns it upright by itself
                    size = exif[TIFF_HEIGHT], exif[TIFF_WIDTH]
                # All tags of a TIFF file look like EXIF: its rows and strips are not those of the output.
                is_kept = bool(exif) and image.format != "TIFF"
                kept = exif.tobytes().removeprefix(b"Exif\0\0") if is_kept else b""
    except Exception as err:  # broken tags of a good image, in as many ways as there are cameras
        log.warning("the tags of %s are left out (%s)", path, err)
        return StillTags()
    if profile and profile[PROFILE_SPACE] != PROFILE_RGB:
        log.warning("the color profile of %s is left out: it is not one for RGB", path)
        profile = b""
    return StillTags(orientation if orientation in TURNS else UPRIGHT, profile, size, kept)


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
