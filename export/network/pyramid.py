"""The papers' generator: detail enhancement with context from a ResNet-50 pyramid."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.network.encoder import Encoder
from export.network.flow import backward_warp
from export.network.generator import Features, Generator
from export.network.layers import ResidualBlock, conv3x3
from export.network.widths import PyramidWidths
from export.spec import WINDOW


class Fuse(nn.Module):
    """Multi-scale feature alignment at one scale: warps the neighbors' features and merges all frames'."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.merge = conv3x3(WINDOW * channels, channels)

    def forward(self, features: Tensor, flow: Tensor) -> Tensor:
        """Align and merge.

        Args:
            features: (N * 3, C, h, w), frames t-1, t, t+1 of each window in a row.
            flow: (N, 4, h, w) in pixels of this scale.

        Returns:
            (N, C, h, w)
        """
        n, _, h, w = flow.shape
        c = features.shape[1]
        frames = features.reshape(n, WINDOW, c, h, w)
        neighbors = frames[:, ::2].reshape(2 * n, c, h, w)
        warped = backward_warp(neighbors, flow.reshape(2 * n, 2, h, w)).reshape(n, 2 * c, h, w)
        return F.relu(self.merge(torch.cat((warped, frames[:, 1]), dim=1)))


class TopDown(nn.Module):
    """Adds coarse context to the next finer level of the pyramid."""

    def __init__(self, c_coarse: int, c_fine: int) -> None:
        super().__init__()
        self.conv = conv3x3(c_coarse, c_fine)

    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:
        """(N, c_coarse, ceil(h/2), ceil(w/2)) and (N, c_fine, h, w) -> (N, c_fine, h, w)."""
        # Odd levels were rounded up by the encoder's strides: the surplus row or column is cropped.
        up = F.interpolate(self.conv(coarse), scale_factor=2.0, mode="nearest")
        return F.relu(fine + up[:, :, : fine.shape[-2], : fine.shape[-1]])


class PyramidGenerator(Generator):
    """ResNet-50 pyramid, alignment at 1/4 and 1/8, detail enhancement at full resolution (both papers)."""

    def __init__(self, widths: PyramidWidths) -> None:
        super().__init__(widths, sources=2)
        self.encoder = Encoder(widths)
        outer, (c4, c8, c16, c32) = widths.encoder_outer, widths.laterals
        self.lateral4 = nn.Conv2d(outer[0], c4, 1)
        self.lateral8 = nn.Conv2d(outer[1], c8, 1)
        self.lateral16 = nn.Conv2d(outer[2], c16, 1)
        self.lateral32 = nn.Conv2d(outer[3], c32, 1)
        self.fuse4 = Fuse(c4)
        self.fuse8 = Fuse(c8)
        self.to16 = TopDown(c32, c16)
        self.to8 = TopDown(c16, c8)
        self.to4 = TopDown(c8, c4)
        self.context = nn.Sequential(
            *(ResidualBlock(c4, widths.context_inner) for _ in range(widths.context_blocks))
        )
        self.up2 = conv3x3(c4, 4 * widths.up)
        self.up1 = conv3x3(widths.up, 4 * widths.body)

    def features(self, frames: Tensor, flow: Tensor, aligned: Tensor) -> Features:
        """All but the last convolution; arguments as for ``generate``."""
        context = self._context(frames, flow)
        level2 = F.relu(F.pixel_shuffle(self.up2(context), 2))
        level1 = F.relu(F.pixel_shuffle(self.up1(level2), 2))
        return Features(self.enhance(torch.cat((self.local(aligned), level1), dim=1)), context)

    def _context(self, frames: Tensor, flow: Tensor) -> Tensor:
        """Features of the window at a quarter of the resolution, (N, c4, H/4, W/4)."""
        n, t, c, h, w = frames.shape
        quarter, eighth = self.encoder.shallow(frames.reshape(n * t, c, h, w))
        center8 = eighth.reshape(n, t, *eighth.shape[1:])[:, 1]
        sixteenth, deepest = self.encoder.deep(center8)

        level16 = self.to16(self.lateral32(deepest), self.lateral16(sixteenth))
        # Strided features sit on every second pixel, from the first: so does their flow.
        level8 = self.to8(level16, self.fuse8(self.lateral8(eighth), 0.5 * flow[:, :, ::2, ::2]))
        context: Tensor = self.context(self.to4(level8, self.fuse4(self.lateral4(quarter), flow)))
        return context
