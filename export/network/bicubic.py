"""Bicubic x4 as one fixed convolution: the generator's skip connection.

TensorRT has no cubic Resize; a 5x5 convolution to 16 sub-pixels per channel is exact on every runtime.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

A = -0.5  # Keys' cubic, as in MATLAB's imresize and Pillow; PyTorch and OpenCV use -0.75
TAPS = 5  # the four taps of each of the scale's phases, at offsets -2..2


def cubic(x: Tensor) -> Tensor:
    """Keys' cubic convolution kernel (Keys 1981, eq. 15) at distance ``x`` in pixels."""
    x = x.abs()
    near = (A + 2) * x**3 - (A + 3) * x**2 + 1
    far = A * (x**3 - 5 * x**2 + 8 * x - 4)
    return torch.where(x <= 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


class BicubicSubpixels(nn.Module):
    """(N, 3, H, W) -> (N, 3 * scale**2, H, W), which a pixel shuffle turns into the bicubic upscale."""

    kernel: Tensor

    def __init__(self, channels: int, scale: int) -> None:
        super().__init__()
        self.channels = channels
        phases = (
            torch.arange(scale, dtype=torch.float64) + 0.5
        ) / scale - 0.5  # sub-pixel centres, in lr pixels
        taps = torch.arange(TAPS, dtype=torch.float64) - TAPS // 2
        rows = cubic(taps - phases[:, None])  # (scale, 5)
        kernel = torch.einsum("ay,bx->abyx", rows, rows).reshape(scale**2, 1, TAPS, TAPS)
        self.register_buffer("kernel", kernel.float().repeat(channels, 1, 1, 1), persistent=False)

    def forward(self, frame: Tensor) -> Tensor:
        """Borders repeat."""
        pad = TAPS // 2
        # Never in a training run's bf16: its eight bits of mantissa are coarser than a grey level.
        with torch.autocast(frame.device.type, enabled=False):
            return F.conv2d(F.pad(frame, (pad,) * 4, "replicate"), self.kernel, groups=self.channels)
