"""EDVR (Wang et al., CVPRW 2019): five frames, aligned by deformable convolutions, merged by attention.

Names of weights follow BasicSR's release of the authors' checkpoints: M and L, without the pre-deblur module.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perf.peers.layers import DeformConv, Reconstruction, ResidualBlock, conv3x3, leaky, upscale

WINDOW = 5
GROUPS = 8  # of channels with offsets of their own
LEVELS = ("l3", "l2", "l1")  # of the pyramid, coarse to fine


class PcdAlignment(nn.Module):
    """Pyramid, cascading and deformable alignment of one frame's features to the center's (section 3.2)."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.offset_conv1 = nn.ModuleDict({level: conv3x3(2 * c, c) for level in LEVELS})
        widths = (c, 2 * c, 2 * c)
        self.offset_conv2 = nn.ModuleDict(
            {n: conv3x3(wide, c) for n, wide in zip(LEVELS, widths, strict=True)}
        )
        self.offset_conv3 = nn.ModuleDict({level: conv3x3(c, c) for level in LEVELS[1:]})
        self.dcn_pack = nn.ModuleDict({level: DeformConv(c, GROUPS) for level in LEVELS})
        self.feat_conv = nn.ModuleDict({level: conv3x3(2 * c, c) for level in LEVELS[1:]})
        self.cas_offset_conv1, self.cas_offset_conv2 = conv3x3(2 * c, c), conv3x3(c, c)
        self.cas_dcnpack = DeformConv(c, GROUPS)

    def forward(self, neighbor: dict[str, Tensor], center: dict[str, Tensor]) -> Tensor:
        """Features by level, (N, C, h, w) each -> (N, C, H, W)."""
        coarse: tuple[Tensor, Tensor] | None = None  # where to look, and what was found, one level up
        for level in LEVELS:
            where = leaky(self.offset_conv1[level](torch.cat((neighbor[level], center[level]), dim=1)))
            if coarse is None:
                where = leaky(self.offset_conv2[level](where))
                found = leaky(self.dcn_pack[level](neighbor[level], where))
            else:
                where = leaky(self.offset_conv2[level](torch.cat((where, 2 * upscale(coarse[0], 2)), dim=1)))
                where = leaky(self.offset_conv3[level](where))
                found = torch.cat(
                    (self.dcn_pack[level](neighbor[level], where), upscale(coarse[1], 2)), dim=1
                )
                found = self.feat_conv[level](found)
                if level != LEVELS[-1]:
                    found = leaky(found)
            coarse = where, found
        where = leaky(self.cas_offset_conv1(torch.cat((found, center[LEVELS[-1]]), dim=1)))
        return leaky(self.cas_dcnpack(found, leaky(self.cas_offset_conv2(where))))


class TsaFusion(nn.Module):
    """Temporal and spatial attention: what resembles the center counts more (section 3.3)."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.temporal_attn1, self.temporal_attn2 = conv3x3(c, c), conv3x3(c, c)
        self.feat_fusion, self.spatial_attn1 = nn.Conv2d(WINDOW * c, c, 1), nn.Conv2d(WINDOW * c, c, 1)
        self.spatial_attn2, self.spatial_attn4 = nn.Conv2d(2 * c, c, 1), nn.Conv2d(c, c, 1)
        self.spatial_attn3, self.spatial_attn5 = conv3x3(c, c), conv3x3(c, c)
        self.spatial_attn_l1, self.spatial_attn_l2 = nn.Conv2d(c, c, 1), conv3x3(2 * c, c)
        self.spatial_attn_l3 = conv3x3(c, c)
        self.spatial_attn_add1, self.spatial_attn_add2 = nn.Conv2d(c, c, 1), nn.Conv2d(c, c, 1)

    def forward(self, aligned: Tensor) -> Tensor:
        """(N, 5, C, H, W) -> (N, C, H, W)."""
        n, t, c, h, w = aligned.shape
        center = self.temporal_attn1(aligned[:, t // 2])
        each = self.temporal_attn2(aligned.reshape(n * t, c, h, w)).view(n, t, c, h, w)
        likeness = torch.sigmoid((each * center.unsqueeze(1)).sum(dim=2, keepdim=True))
        weighted = (aligned * likeness).reshape(n, t * c, h, w)
        attention = leaky(self.spatial_attn2(_halved(leaky(self.spatial_attn1(weighted)))))
        coarser = leaky(self.spatial_attn_l2(_halved(leaky(self.spatial_attn_l1(attention)))))
        coarser = upscale(leaky(self.spatial_attn_l3(coarser)), 2)
        attention = leaky(self.spatial_attn4(leaky(self.spatial_attn3(attention)) + coarser))
        attention = self.spatial_attn5(upscale(attention, 2))
        shift = self.spatial_attn_add2(leaky(self.spatial_attn_add1(attention)))
        # Twice the sigmoid: about 1 before training.
        return leaky(self.feat_fusion(weighted)) * torch.sigmoid(attention) * 2 + shift


def _halved(x: Tensor) -> Tensor:
    """Largest and mean of every other pixel's neighborhood."""
    return torch.cat((F.max_pool2d(x, 3, 2, 1), F.avg_pool2d(x, 3, 2, 1)), dim=1)


class Edvr(Reconstruction):
    """Features of every frame, alignment, fusion, reconstruction of the center frame."""

    def __init__(self, c: int, blocks: int) -> None:
        super().__init__(c)
        self.conv_first = conv3x3(3, c)
        self.feature_extraction = nn.Sequential(*(ResidualBlock(c) for _ in range(5)))
        self.conv_l2_1, self.conv_l2_2 = conv3x3(c, c, 2), conv3x3(c, c)
        self.conv_l3_1, self.conv_l3_2 = conv3x3(c, c, 2), conv3x3(c, c)
        self.pcd_align, self.fusion = PcdAlignment(c), TsaFusion(c)
        self.reconstruction = nn.Sequential(*(ResidualBlock(c) for _ in range(blocks)))

    def forward(self, frames: Tensor) -> Tensor:
        """(N, 5, 3, H, W), H and W multiples of 4 -> (N, 1, 3, 4H, 4W)."""
        l1 = self.feature_extraction(leaky(self.conv_first(frames.flatten(0, 1))))
        l2 = leaky(self.conv_l2_2(leaky(self.conv_l2_1(l1))))
        l3 = leaky(self.conv_l3_2(leaky(self.conv_l3_1(l2))))
        pyramids = [x.unflatten(0, frames.shape[:2]).unbind(1) for x in (l3, l2, l1)]
        features = [dict(zip(LEVELS, levels, strict=True)) for levels in zip(*pyramids, strict=True)]
        aligned = torch.stack([self.pcd_align(one, features[WINDOW // 2]) for one in features], dim=1)
        answer = self.reconstruct(self.reconstruction(self.fusion(aligned)), frames[:, WINDOW // 2])
        return answer.unsqueeze(1)
