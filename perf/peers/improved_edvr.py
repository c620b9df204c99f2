"""Improved EDVR (Huang and Chen, WACV Workshops 2022), as far as it is known.

Known: the title, "Improved EDVR Model for Robust and Efficient Video Super-Resolution", that it lightens
EDVR's pre-deblur module, puts 3D convolutions in the place of some deformable ones, adds channel attention,
and has 3.5 M parameters. No code and no text are public, and no checkpoint.

Assumed: everything else. EDVR-M's widths; two 3D convolutions instead of the deformable ones of the
pyramid's two coarser levels, whose result joins the finest level; RCAN's attention (Zhang et al., ECCV 2018)
in the reconstruction, whose depth is what 3.5 M leave. So its row tells what a network of this kind costs,
not what theirs does.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perf.peers.deform_conv import DeformConv
from perf.peers.edvr import GROUPS, WINDOW, TsaFusion
from perf.peers.layers import Reconstruction, ResidualBlock, conv3x3, leaky, upscale

CHANNELS = 64
SQUEEZE = 16  # RCAN's reduction
BLOCKS = 29


class AttentionBlock(nn.Module):
    """A residual block whose channels are weighted by what the whole frame has of each."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv3x3(CHANNELS, CHANNELS), nn.ReLU(), conv3x3(CHANNELS, CHANNELS))
        self.attention = nn.Sequential(
            nn.Conv2d(CHANNELS, CHANNELS // SQUEEZE, 1),
            nn.ReLU(),
            nn.Conv2d(CHANNELS // SQUEEZE, CHANNELS, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, 64, h, w) -> same."""
        found = self.body(x)
        return x + found * torch.sigmoid(self.attention(found.mean(dim=(2, 3), keepdim=True)))


class ImprovedEdvr(Reconstruction):
    """Light features, 3D convolutions where motion is coarse, one deformable alignment where it is fine."""

    def __init__(self) -> None:
        super().__init__(CHANNELS)
        self.first = conv3x3(3, CHANNELS)
        self.deblur = nn.ModuleList(ResidualBlock(CHANNELS) for _ in range(2))  # on half the size, and on all
        self.to_half = conv3x3(CHANNELS, CHANNELS, 2)
        self.coarse = nn.ModuleList(nn.Conv3d(CHANNELS, CHANNELS, 3, padding=1) for _ in range(2))
        self.where = nn.Sequential(
            conv3x3(3 * CHANNELS, CHANNELS), nn.LeakyReLU(0.1), conv3x3(CHANNELS, CHANNELS), nn.LeakyReLU(0.1)
        )
        self.align = DeformConv(CHANNELS, GROUPS)
        self.fusion = TsaFusion(CHANNELS)
        self.reconstruction = nn.Sequential(*(AttentionBlock() for _ in range(BLOCKS)))

    def forward(self, frames: Tensor) -> Tensor:
        """(N, 5, 3, H, W), H and W multiples of 4 -> (N, 1, 3, 4H, 4W)."""
        n, t, c, h, w = frames.shape
        fine = leaky(self.first(frames.reshape(n * t, c, h, w)))
        half = self.deblur[0](leaky(self.to_half(fine)))
        fine = self.deblur[1](fine + upscale(half, 2))
        motion = half.view(n, t, CHANNELS, h // 2, w // 2).transpose(1, 2)
        for conv in self.coarse:
            motion = leaky(conv(motion))
        motion = upscale(motion.transpose(1, 2).reshape(n * t, CHANNELS, h // 2, w // 2), 2)
        centre = fine.view(n, t, CHANNELS, h, w)[:, WINDOW // 2]
        repeated = centre.unsqueeze(1).expand(n, t, CHANNELS, h, w).reshape(n * t, CHANNELS, h, w)
        where = self.where(torch.cat((fine, repeated, motion), dim=1))
        aligned = F.leaky_relu(self.align(fine, where), 0.1).view(n, t, CHANNELS, h, w)
        answer = self.reconstruct(self.reconstruction(self.fusion(aligned)), frames[:, WINDOW // 2])
        return answer.unsqueeze(1)
