"""PSNR and SSIM on luma, as the field reports them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from skimage.metrics import structural_similarity

BORDER = 4  # hr pixels left out on each side: the scale, as is the custom


def luma(rgb: NDArray[np.uint8]) -> NDArray[np.float64]:
    """BT.601 studio-swing luma, 16..235, of (..., 3) uint8 RGB; not rounded (as MATLAB's rgb2ycbcr)."""
    return rgb @ np.array([65.481, 128.553, 24.966]) / 255 + 16


def _inner(rgb: NDArray[np.uint8]) -> NDArray[np.float64]:
    return luma(rgb)[..., BORDER:-BORDER, BORDER:-BORDER]


def psnr_y(image: NDArray[np.uint8], truth: NDArray[np.uint8]) -> float:
    """PSNR-Y in dB of two (H, W, 3) uint8 RGB images; infinite when equal."""
    error = float(np.mean((_inner(image) - _inner(truth)) ** 2))
    return float("inf") if error == 0 else 10 * float(np.log10(255**2 / error))


def ssim_y(image: NDArray[np.uint8], truth: NDArray[np.uint8]) -> float:
    """SSIM-Y of two (H, W, 3) uint8 RGB images: Gaussian window of sigma 1.5 (Wang et al. 2004)."""
    return float(
        structural_similarity(
            _inner(image),
            _inner(truth),
            data_range=255,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
    )
