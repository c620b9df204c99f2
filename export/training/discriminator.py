"""Temporal discriminator: tells three consecutive frames of footage from three answers of the generator."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm

from export.spec import CHANNELS

FRAMES = 3  # judged together: flicker shows in nothing less
WIDTHS = (64, 64, 128, 128, 256)  # channels at 1, 1/2, 1/4, 1/8 and 1/16 of the hr resolution
SLOPE = 0.2


class Discriminator(nn.Module):
    """Strided convolutions to a score per patch, each of spectral norm 1 (Miyato et al. 2018).

    It also sees the middle frame's bicubic upscale: an answer must be real footage of this very picture.
    Under autocast its convolutions run in bf16, but the estimates of the spectral norm, which would not
    outlive that, in FP32.
    """

    def __init__(self) -> None:
        super().__init__()
        first, *deeper = WIDTHS
        layers: list[nn.Module] = [nn.Conv2d((FRAMES + 1) * CHANNELS, first, 3, padding=1)]
        for before, width in zip(WIDTHS, deeper, strict=False):
            layers.append(nn.Conv2d(before, width, 4, stride=2, padding=1))
        layers.append(nn.Conv2d(WIDTHS[-1], 1, 3, padding=1))
        self.layers = nn.ModuleList(spectral_norm(layer) for layer in layers)

    def forward(self, frames: Tensor, bicubic: Tensor) -> Tensor:
        """Judge.

        Args:
            frames: (N, 3, 3, H, W) float32, nominally 0..1: frames t-1, t, t+1; sides multiples of 16.
            bicubic: (N, 3, H, W) float32: frame t, upscaled from lr.

        Returns:
            (N, 1, H/16, W/16) float32: above 0 looks like footage, below like an answer.
        """
        x = torch.cat((frames.flatten(1, 2), bicubic), 1) * 2 - 1
        *hidden, last = self.layers
        with parametrize.cached():
            with torch.autocast(frames.device.type, enabled=False):
                for layer in self.layers:
                    _ = layer.weight  # estimates its norm, once
            for layer in hidden:
                x = F.leaky_relu(layer(x), SLOPE)
            scores: Tensor = last(x)
        return scores.float()
