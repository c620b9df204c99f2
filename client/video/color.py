"""The colors of a clip: its matrix, range, primaries and transfer, and conversion to RGB and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import av
from av.video.reformatter import ColorRange, ColorTrc, Interpolation

from ..errors import UpscaleError
from ..frames.windows import Image, Size

# H.273 code points, as FFmpeg numbers them; av.Colorspace carries swscale's numbers, which differ.
RGB, BT709, UNSPECIFIED, FCC, BT470BG, SMPTE170M, SMPTE240M, BT2020_NCL = 0, 1, 2, 4, 5, 6, 7, 9

# PyAV hands swscale's own numbers through; there, SMPTE 170M and BT.470BG are one matrix.
SWSCALE_MATRIX = {
    BT709: 1,
    FCC: 4,
    BT470BG: 5,
    SMPTE170M: 5,
    SMPTE240M: 7,
    BT2020_NCL: 9,
}

MATRIX_NAMES = {
    BT709: "BT.709",
    FCC: "FCC",
    BT470BG: "BT.601 (625 lines)",
    SMPTE170M: "BT.601",
    SMPTE240M: "SMPTE 240M",
    BT2020_NCL: "BT.2020",
}

# Bilinear chroma would shift and smear color edges before the model sees them.
QUALITY = (
    Interpolation.BICUBIC
    | Interpolation.FULL_CHR_H_INT
    | Interpolation.FULL_CHR_H_INP
    | Interpolation.ACCURATE_RND
    | Interpolation.BITEXACT
)

HD_HEIGHT_PX, HD_WIDTH_PX = 577, 1280  # from here players take an untagged clip for BT.709, below for BT.601


@dataclass(frozen=True)
class Color:
    """How the numbers of a YUV clip mean colors; all fields are H.273 code points."""

    matrix: int
    full_range: bool
    primaries: int
    transfer: int

    @property
    def is_hdr(self) -> bool:
        """Whether the transfer is PQ or HLG."""
        return self.transfer in (ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67)

    def __str__(self) -> str:
        """Name matrix and range."""
        return f"{MATRIX_NAMES[self.matrix]}, {'full' if self.full_range else 'limited'} range"

    @property
    def range(self) -> ColorRange:
        """The range of the YUV numbers in FFmpeg's terms."""
        return ColorRange.JPEG if self.full_range else ColorRange.MPEG


def color_of(frame: av.VideoFrame) -> Color:
    """Read the colors of a decoded frame; what it leaves open is filled in as players do.

    The filled-in matrix is written to the output: four times as large, an untagged SD clip would
    otherwise be taken for HD and shown in other colors.
    """
    matrix = frame.colorspace
    if frame.format.is_rgb:
        # Encoded as YUV in the end; the matrix is then ours to choose.
        return Color(BT709, False, frame.color_primaries, frame.color_trc)
    if matrix in (UNSPECIFIED, RGB):
        is_hd = frame.height >= HD_HEIGHT_PX or frame.width >= HD_WIDTH_PX
        matrix = BT709 if is_hd else SMPTE170M
    if matrix not in SWSCALE_MATRIX:
        raise UpscaleError(
            f"expected a BT.601, BT.709 or BT.2020 (non-constant luminance) color matrix, found H.273 "
            f"code {matrix}: convert the clip first"
        )
    full_range = frame.color_range == ColorRange.JPEG or frame.format.name.startswith("yuvj")
    return Color(matrix, full_range, frame.color_primaries, frame.color_trc)


def rgb_from_frame(frame: av.VideoFrame, color: Color, size: Size | None = None) -> Image:
    """Convert a decoded frame of these colors to (H, W, 3) uint8 RGB, 0..255, of a (height, width)."""
    height, width = size or (frame.height, frame.width)
    yuv = {} if frame.format.is_rgb else {"src_color_range": color.range}
    rgb = frame.reformat(
        width=width,
        height=height,
        format="rgb24",
        src_colorspace=SWSCALE_MATRIX[color.matrix],
        dst_color_range=ColorRange.JPEG,
        interpolation=QUALITY,
        threads=1,
        **yuv,
    )
    return cast(Image, rgb.to_ndarray())


def frame_from_rgb(image: Image, size: Size, pix_fmt: str, color: Color) -> av.VideoFrame:
    """Convert (H, W, 3) uint8 RGB, 0..255, to a frame with the given (height, width), format and colors."""
    rgb = av.VideoFrame.from_numpy_buffer(image, format="rgb24")  # the image itself, not a copy
    frame = rgb.reformat(
        width=size[1],
        height=size[0],
        format=pix_fmt,
        src_color_range=ColorRange.JPEG,
        dst_colorspace=SWSCALE_MATRIX[color.matrix],
        dst_color_range=color.range,
        interpolation=QUALITY,
        threads=1,
    )
    frame.color_primaries = color.primaries
    frame.color_trc = color.transfer
    return frame
