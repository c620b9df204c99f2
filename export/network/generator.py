"""Stage 2, the generator: window, flow and aligned frames in, the hr frame's sub-pixels out."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.network.bicubic import BicubicSubpixels
from export.network.encoder import Encoder
from export.network.frames import frames_from_window, grey_levels
from export.network.layers import conv3x3, zeroed
from export.network.warp import backward_warp
from export.network.widths import Widths
from export.spec import ALIGNED, CHANNELS, NEUTRAL, SCALE, WINDOW


class ResidualBlock(nn.Module):
    """x + conv(relu(conv(x))); starts as the identity."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(channels, inner)
        self.conv2 = zeroed(conv3x3(inner, channels))

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, h, w) -> same."""
        return x + self.conv2(F.relu(self.conv1(x)))


class Fuse(nn.Module):
    """Multi-scale feature alignment at one scale: warps the neighbours' features and merges all frames'."""

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
        neighbours = frames[:, ::2].reshape(2 * n, c, h, w)
        warped = backward_warp(neighbours, flow.reshape(2 * n, 2, h, w)).reshape(n, 2 * c, h, w)
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


class Features(NamedTuple):
    """What a generator knows before its last convolution, and where its pyramid ends."""

    context: Tensor
    """(N, C, H/4, W/4)"""
    detail: Tensor
    """(N, C, H, W)"""


class Generator(nn.Module):
    """ResNet-50 pyramid, alignment at 1/4 and 1/8, detail enhancement at full resolution (both papers)."""

    def __init__(self, widths: Widths) -> None:
        super().__init__()
        self.encoder = Encoder(widths)
        outer, (c4, c8, c16, c32), detail = widths.encoder_outer, widths.laterals, widths.detail
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
        self.up1 = conv3x3(widths.up, 4 * detail)
        self.full = conv3x3(ALIGNED.dims[0], detail)
        self.join = nn.Conv2d(2 * detail, detail, 1)
        self.detail = nn.Sequential(
            *(ResidualBlock(detail, widths.detail_inner) for _ in range(widths.detail_blocks))
        )
        self.tail = zeroed(conv3x3(detail, CHANNELS * SCALE**2))  # untrained: bicubic
        self.skip = BicubicSubpixels(CHANNELS, SCALE)

    def forward(self, lr_window: Tensor, flow: Tensor, aligned: Tensor) -> Tensor:
        """Generate the hr frame.

        Args:
            lr_window: (N, 3, H, W, 3) uint8 RGB; H and W multiples of 4.
            flow: (N, 4, H/4, W/4) float32, see ``spec.FLOW``.
            aligned: (N, 37, H, W) uint8, see ``spec.ALIGNED``.

        Returns:
            (N, 48, H, W) uint8: sub-pixels, see ``spec.SUBPIXELS``.
        """
        return grey_levels(self.generate(frames_from_window(lr_window), flow, aligned.float() / 255))

    def generate(self, frames: Tensor, flow: Tensor, aligned: Tensor) -> Tensor:
        """As ``forward``, from (N, 3, 3, H, W) float32 frames and (N, 37, H, W) ``aligned``, both 0..1.

        Returns:
            (N, 48, H, W) float32: sub-pixels, not clamped.
        """
        return self.finish(self.features(frames, flow, aligned), frames)

    def features(self, frames: Tensor, flow: Tensor, aligned: Tensor) -> Features:
        """All but the last convolution; arguments as for ``generate``."""
        n, t, c, h, w = frames.shape
        quarter, eighth = self.encoder.shallow(frames.reshape(n * t, c, h, w))
        centre8 = eighth.reshape(n, t, *eighth.shape[1:])[:, 1]
        sixteenth, deepest = self.encoder.deep(centre8)

        level16 = self.to16(self.lateral32(deepest), self.lateral16(sixteenth))
        # Strided features sit on every second pixel, from the first: so does their flow.
        level8 = self.to8(level16, self.fuse8(self.lateral8(eighth), 0.5 * flow[:, :, ::2, ::2]))
        level4 = self.context(self.to4(level8, self.fuse4(self.lateral4(quarter), flow)))

        level2 = F.relu(F.pixel_shuffle(self.up2(level4), 2))
        level1 = F.relu(F.pixel_shuffle(self.up1(level2), 2))
        # Around zero, or what the neighbours add would drown in a constant.
        full = F.relu(self.full(aligned - NEUTRAL / 255))
        detail = self.detail(F.relu(self.join(torch.cat((full, level1), dim=1))))
        return Features(level4, detail)

    def finish(self, features: Features, frames: Tensor) -> Tensor:
        """Sub-pixels (N, 48, H, W) from the features of (N, 3, 3, H, W) frames, 0..1; not clamped."""
        return self.tail(features.detail) + self.skip(frames[:, 1])
