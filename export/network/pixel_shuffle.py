"""Stage 3, pixel-shuffle postprocess: sub-pixels in, the 8-bit hr frame out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.spec import SCALE


class PixelShuffle(nn.Module):
    """Rearranges, clamps and rounds in the graph, so that a quarter of the bytes leaves the server."""

    def forward(self, subpixels: Tensor) -> Tensor:
        """(N, 48, H, W) float, nominally 0..1 -> (N, 4H, 4W, 3) uint8 RGB."""
        hr = F.pixel_shuffle(subpixels, SCALE)
        return (hr.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
