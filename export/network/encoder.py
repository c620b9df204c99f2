"""A ResNet-50 without normalization: the generator's multi-scale encoder."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from export.network.layers import zeroed
from export.network.widths import PyramidWidths


class Bottleneck(nn.Module):
    """ResNet's 1x1 -> 3x3 -> 1x1 residual block.

    No batch norm: super-resolution suffers from its range shifts, and there is nothing to fold. The last
    convolution starts at zero instead, so that the depth is trainable from the first step.
    """

    def __init__(self, c_in: int, inner: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(c_in, inner, 1)
        self.spatial = nn.Conv2d(inner, inner, 3, stride, padding=1)
        self.expand = zeroed(nn.Conv2d(inner, c_out, 1))
        self.skip = nn.Conv2d(c_in, c_out, 1, stride) if stride > 1 or c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(N, c_in, h, w) -> (N, c_out, ceil(h / stride), ceil(w / stride))."""
        branch = self.expand(F.relu(self.spatial(F.relu(self.reduce(x)))))
        return F.relu(self.skip(x) + branch)


def _layer(c_in: int, inner: int, c_out: int, depth: int, stride: int) -> nn.Sequential:
    blocks = [Bottleneck(c_in, inner, c_out, stride)]
    blocks += [Bottleneck(c_out, inner, c_out, 1) for _ in range(depth - 1)]
    return nn.Sequential(*blocks)


class Encoder(nn.Module):
    """Features of single frames at 1/4 and 1/8, and context of the center frame at 1/16 and 1/32.

    Siamese over frames and run on unwarped ones, so that a stream could encode each frame once. The deep
    half runs on the center frame only: semantic context needs no alignment.
    """

    def __init__(self, widths: PyramidWidths) -> None:
        super().__init__()
        outer, inner, depths = widths.encoder_outer, widths.encoder_inner, widths.encoder_depths
        self.stem = nn.Conv2d(3, widths.stem, 7, stride=2, padding=3)
        self.layer1 = _layer(widths.stem, inner[0], outer[0], depths[0], 1)
        self.layer2 = _layer(outer[0], inner[1], outer[1], depths[1], 2)
        self.layer3 = _layer(outer[1], inner[2], outer[2], depths[2], 2)
        self.layer4 = _layer(outer[2], inner[3], outer[3], depths[3], 2)

    def shallow(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """(M, 3, H, W) -> features at 1/4 and 1/8."""
        x = F.max_pool2d(F.relu(self.stem(frames)), 3, stride=2, padding=1)
        quarter = self.layer1(x)
        return quarter, self.layer2(quarter)

    def deep(self, eighth: Tensor) -> tuple[Tensor, Tensor]:
        """Features at 1/8 -> context at 1/16 and 1/32."""
        sixteenth = self.layer3(eighth)
        return sixteenth, self.layer4(sixteenth)
