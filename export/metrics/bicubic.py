"""Bicubic x4: the baseline that every score is compared with."""

from __future__ import annotations

from torch import Tensor

from export.network.frames import to_uint8
from export.network.layers import BicubicSubpixels, PixelShuffle
from export.spec import CHANNELS, SCALE, WINDOW


def bicubic(lr_window: Tensor) -> Tensor:
    """Upscale the center frame of a window by Keys' cubic.

    Args:
        lr_window: (N, 3, H, W, 3) uint8 RGB.

    Returns:
        (N, 4H, 4W, 3) uint8 RGB.
    """
    center = lr_window[:, WINDOW // 2].permute(0, 3, 1, 2).float() / 255
    return PixelShuffle()(to_uint8(BicubicSubpixels(CHANNELS, SCALE).to(center.device)(center)))
