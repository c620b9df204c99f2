"""Rows for orientation: one frame at a time, by EDSR's baseline and by bicubic interpolation."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from perf.peers.layers import ResidualBlock, conv3x3

CHANNELS = 64
BLOCKS = 16


class EdsrBaseline(nn.Module):
    """EDSR's baseline (Lim et al., CVPRW 2017, table 1): 16 blocks of 64 channels.

    Names of weights follow BasicSR's release.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv_first = conv3x3(3, CHANNELS)
        self.body = nn.Sequential(*(ResidualBlock(CHANNELS) for _ in range(BLOCKS)))
        self.conv_after_body = conv3x3(CHANNELS, CHANNELS)
        doubling = [conv3x3(CHANNELS, 4 * CHANNELS), nn.PixelShuffle(2)]
        self.upsample = nn.Sequential(*doubling, conv3x3(CHANNELS, 4 * CHANNELS), nn.PixelShuffle(2))
        self.conv_last = conv3x3(CHANNELS, 3)

    def forward(self, frames: Tensor) -> Tensor:
        """(N, 1, 3, H, W) -> (N, 1, 3, 4H, 4W)."""
        x = self.conv_first(frames[:, 0])
        x = x + self.conv_after_body(self.body(x))
        answer: Tensor = self.conv_last(self.upsample(x))
        return answer.unsqueeze(1)


class Bicubic(nn.Module):
    """No network at all."""

    def forward(self, frames: Tensor) -> Tensor:
        """(N, 1, 3, H, W) -> (N, 1, 3, 4H, 4W)."""
        return F.interpolate(frames[:, 0], scale_factor=4.0, mode="bicubic", align_corners=False).unsqueeze(1)
