"""The second stage: the generator of the hr frame's sub-pixels."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from export.network.frames import frames_from_window, to_uint8
from export.network.layers import BicubicSubpixels, ResidualBlock, conv3x3, zeroed
from export.network.widths import Widths
from export.spec import ALIGNED, CHANNELS, NEUTRAL, SCALE


class Features(NamedTuple):
    """Features before the last convolution, and at the end of the pyramid, if there is one."""

    body: Tensor
    """(N, C, H, W)"""
    context: Tensor | None = None
    """(N, C, H/4, W/4)"""


class Generator(nn.Module):
    """Detail enhancement at full resolution: all of a light network, and the end of the papers'."""

    def __init__(self, widths: Widths, sources: int = 1) -> None:
        """``sources`` of ``widths.body`` channels each are fused; the first comes from ``local``."""
        super().__init__()
        body = widths.body
        self.stem = conv3x3(ALIGNED.dims[0], body)
        self.fuse = nn.Conv2d(sources * body, body, 1)
        self.body = nn.Sequential(*(ResidualBlock(body, inner) for inner in widths.body_inner))
        self.head = zeroed(conv3x3(body, CHANNELS * SCALE**2))  # untrained: bicubic
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
        return to_uint8(self.generate(frames_from_window(lr_window), flow, aligned.float() / 255))

    def generate(self, frames: Tensor, flow: Tensor, aligned: Tensor) -> Tensor:
        """As ``forward``, from (N, 3, 3, H, W) float32 frames and (N, 37, H, W) ``aligned``, both 0..1.

        Returns:
            (N, 48, H, W) float32: sub-pixels, not clamped.
        """
        return self.finish(self.features(frames, flow, aligned), frames)

    def features(self, frames: Tensor, flow: Tensor, aligned: Tensor) -> Features:
        """All but the last convolution; arguments as for ``generate``."""
        return Features(self.enhance(self.local(aligned)))

    def local(self, aligned: Tensor) -> Tensor:
        """(N, 37, H, W) ``aligned``, 0..1 -> (N, body, H, W)."""
        # Around zero, or the neighbors' small differences would be lost beside a constant.
        return F.relu(self.stem(aligned - NEUTRAL / 255))

    def enhance(self, sources: Tensor) -> Tensor:
        """Detail enhancement of (N, sources * body, H, W) -> (N, body, H, W)."""
        features: Tensor = self.body(F.relu(self.fuse(sources)))
        return features

    def finish(self, features: Features, frames: Tensor) -> Tensor:
        """Sub-pixels (N, 48, H, W) from the features of (N, 3, 3, H, W) frames, 0..1; not clamped."""
        return self.head(features.body) + self.skip(frames[:, 1])
