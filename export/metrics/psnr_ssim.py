"""PSNR and SSIM, on luma or on RGB, as the field reports them."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from skimage.metrics import structural_similarity

BORDER = 4  # hr pixels left out on each side: the scale, as is the custom for single images

Channels = Literal["y", "rgb"]


def luma_bt601(rgb: NDArray[np.uint8]) -> NDArray[np.float64]:
    """BT.601 studio-swing luma, 16..235, of (..., 3) uint8 RGB; not rounded (as MATLAB's rgb2ycbcr)."""
    return rgb @ np.array([65.481, 128.553, 24.966]) / 255 + 16


def psnr(
    image: NDArray[np.uint8], truth: NDArray[np.uint8], *, channels: Channels = "y", border: int = BORDER
) -> float:
    """PSNR in dB of two (H, W, 3) uint8 RGB images; infinite when equal.

    Args:
        image: compared with the truth.
        truth: of the same size.
        channels: ``y``: the error of the luma; ``rgb``: the mean over the three channels.
        border: hr pixels left out on each side.
    """
    error = float(np.mean((_inner(image, channels, border) - _inner(truth, channels, border)) ** 2))
    return float("inf") if error == 0 else 10 * float(np.log10(255**2 / error))


def ssim(
    image: NDArray[np.uint8], truth: NDArray[np.uint8], *, channels: Channels = "y", border: int = BORDER
) -> float:
    """SSIM of two (H, W, 3) uint8 RGB images: Gaussian window of sigma 1.5 (Wang et al. 2004).

    Arguments as for `psnr`; ``rgb``: the mean over the three channels.
    """
    return float(
        structural_similarity(
            _inner(image, channels, border),
            _inner(truth, channels, border),
            data_range=255,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            channel_axis=-1 if channels == "rgb" else None,
        )
    )


def psnr_y(image: NDArray[np.uint8], truth: NDArray[np.uint8]) -> float:
    """PSNR-Y in dB without a border of 4 pixels; as `psnr`."""
    return psnr(image, truth)


def ssim_y(image: NDArray[np.uint8], truth: NDArray[np.uint8]) -> float:
    """SSIM-Y without a border of 4 pixels; as `ssim`."""
    return ssim(image, truth)


def _inner(rgb: NDArray[np.uint8], channels: Channels, border: int) -> NDArray[np.float64]:
    height, width = rgb.shape[:2]
    inner = rgb[border : height - border, border : width - border]
    return luma_bt601(inner) if channels == "y" else inner.astype(np.float64)
