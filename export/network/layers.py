"""Building blocks of the network."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.spec import CHANNELS, SCALE

A = -0.5  # Keys' cubic, as in MATLAB's imresize and Pillow; PyTorch and OpenCV use -0.75
TAPS = 5  # the four taps of each of the scale's phases, at offsets -2..2


def conv3x3(c_in: int, c_out: int) -> nn.Conv2d:
    """A 3x3 convolution that keeps the size."""
    return nn.Conv2d(c_in, c_out, 3, padding=1)


def zeroed(conv: nn.Conv2d) -> nn.Conv2d:
    """The same convolution, answering zero until trained: the last one of a residual branch."""
    nn.init.zeros_(conv.weight)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


def convolutions(network: nn.Module) -> dict[str, nn.Conv2d]:
    """All of them, by name, in the network's order."""
    return {name: module for name, module in network.named_modules() if isinstance(module, nn.Conv2d)}


class ResidualBlock(nn.Module):
    """x + conv(relu(conv(x))); starts as the identity."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(channels, inner)
        self.conv2 = zeroed(conv3x3(inner, channels))

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, h, w) -> same."""
        return x + self.conv2(F.relu(self.conv1(x)))


def cubic(x: Tensor) -> Tensor:
    """Keys' cubic convolution kernel (Keys 1981, eq. 15) at distance ``x`` in pixels."""
    x = x.abs()
    near = (A + 2) * x**3 - (A + 3) * x**2 + 1
    far = A * (x**3 - 5 * x**2 + 8 * x - 4)
    return torch.where(x <= 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


class BicubicSubpixels(nn.Module):
    """Bicubic x4 as one fixed convolution: the generator's skip connection.

    TensorRT has no cubic Resize; a 5x5 convolution to 16 sub-pixels per channel is exact on every runtime.
    """

    kernel: Tensor

    def __init__(self, channels: int, scale: int) -> None:
        super().__init__()
        self.channels = channels
        phases = (
            torch.arange(scale, dtype=torch.float64) + 0.5
        ) / scale - 0.5  # sub-pixel centers, in lr pixels
        taps = torch.arange(TAPS, dtype=torch.float64) - TAPS // 2
        rows = cubic(taps - phases[:, None])  # (scale, 5)
        kernel = torch.einsum("ay,bx->abyx", rows, rows).reshape(scale**2, 1, TAPS, TAPS)
        self.register_buffer("kernel", kernel.float().repeat(channels, 1, 1, 1), persistent=False)

    def forward(self, frame: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, 3 * scale**2, H, W), to be pixel-shuffled; borders repeat."""
        pad = TAPS // 2
        # Never in a training run's bf16: its eight bits of mantissa are coarser than a gray level.
        with torch.autocast(frame.device.type, enabled=False):
            return F.conv2d(F.pad(frame, (pad,) * 4, "replicate"), self.kernel, groups=self.channels)


class PixelShuffle(nn.Module):
    """The third stage: a rearrangement of bytes, in two steps that ONNX Runtime's CPU provider is fast at.

    It transposes two axes by runs of bytes, more of them one byte at a time. DepthToSpace and a transpose to
    channels last take 2.5 times as long at 320x180, the six axes at once 8 times.
    """

    def forward(self, subpixels: Tensor) -> Tensor:
        """(N, 48, H, W) -> (N, 4H, 4W, 3); any type."""
        n, _, h, w = subpixels.shape
        split = subpixels.reshape(n, CHANNELS, SCALE, SCALE, h, w)  # n, c, y, x, h, w
        rows = split.permute(0, 4, 2, 3, 1, 5).reshape(n, h, SCALE, SCALE * CHANNELS, w)  # n, h, y, (x, c), w
        pixels = rows.permute(0, 1, 2, 4, 3)  # n, h, y, w, (x, c)
        return pixels.reshape(n, SCALE * h, SCALE * w, CHANNELS)
