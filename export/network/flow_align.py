"""Stage 1, flow alignment: a window of frames in, optical flow and neighbours warped to the centre out."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.network.frames import frames_from_window
from export.network.layers import conv3x3, zeroed
from export.network.warp import backward_warp
from export.network.widths import Widths
from export.spec import FLOW_STRIDE

LEVELS = 5  # coarse to fine, from 1/64 to 1/4 of the lr frame: reaches motion of about 64 x 2 px
GRANULE = 2 ** (LEVELS - 1)  # the pyramid's base is padded to this many pixels so that every halving is exact


class Estimate(NamedTuple):
    """A flow (M, 2, h, w), in pixels of its own resolution, between two images (M, 3, h, w)."""

    centre: Tensor
    neighbour: Tensor
    flow: Tensor
    stride: int
    """Lr pixels per pixel of this estimate."""


class FlowLevel(nn.Module):
    """Estimates what is missing from an upsampled flow, given the centre and the warped neighbour."""

    def __init__(self, hidden: tuple[int, ...]) -> None:
        super().__init__()
        widths = (8, *hidden)
        layers: list[nn.Module] = []
        for c_in, c_out in pairwise(widths):
            layers += [conv3x3(c_in, c_out), nn.ReLU(inplace=True)]
        self.hidden = nn.Sequential(*layers)
        self.residual = zeroed(conv3x3(widths[-1], 2))  # untrained: no motion

    def forward(self, centre: Tensor, neighbour: Tensor, flow: Tensor) -> Tensor:
        """Refine ``flow`` (M, 2, h, w) between two (M, 3, h, w) images of its resolution."""
        warped = backward_warp(neighbour, flow)
        residual: Tensor = self.residual(self.hidden(torch.cat((centre, warped, flow), dim=1)))
        return flow + residual


def upsample_flow(flow: Tensor) -> Tensor:
    """Double the resolution of a flow, and with it its unit."""
    return 2 * F.interpolate(flow, scale_factor=2.0, mode="bilinear", align_corners=False)


class FlowAlign(nn.Module):
    """One flow per neighbour, estimated on a reduced image, reused at every scale (paper 1, MSFA simplified).

    The flow is found coarse to fine on frames of 1/4 resolution and refined once at 1/2. It is trained
    from scratch.
    """

    def __init__(self, widths: Widths) -> None:
        super().__init__()
        c1, c2, c3 = widths.flow
        self.levels = nn.ModuleList(FlowLevel((c1, c2, c2, c3)) for _ in range(LEVELS))
        self.refine = FlowLevel((widths.flow_refine,) * 3)

    def estimate(self, centre: Tensor, neighbour: Tensor) -> list[Estimate]:
        """Flow from ``centre`` to ``neighbour``, coarse to fine.

        Args:
            centre: (M, 3, H, W) float32, 0..1; H and W multiples of 4.
            neighbour: same.

        Returns:
            One estimate per level of the padded pyramid, then the answer at (H/2, W/2). Training judges
            them all.
        """
        centre_half, neighbour_half = F.avg_pool2d(centre, 2), F.avg_pool2d(neighbour, 2)
        centre_quarter, neighbour_quarter = F.avg_pool2d(centre_half, 2), F.avg_pool2d(neighbour_half, 2)
        height, width = centre_quarter.shape[-2:]
        padding = (0, -width % GRANULE, 0, -height % GRANULE)
        pyramid = [
            (F.pad(centre_quarter, padding, "replicate"), F.pad(neighbour_quarter, padding, "replicate"))
        ]
        for _ in range(LEVELS - 1):
            pyramid.append((F.avg_pool2d(pyramid[-1][0], 2), F.avg_pool2d(pyramid[-1][1], 2)))

        flow = torch.zeros_like(pyramid[-1][0][:, :2])
        estimates: list[Estimate] = []
        for index, (level, pair) in enumerate(zip(self.levels, reversed(pyramid), strict=True)):
            if index:
                flow = upsample_flow(flow)
            flow = level(*pair, flow)
            estimates.append(Estimate(*pair, flow, FLOW_STRIDE * GRANULE >> index))
        flow = upsample_flow(flow[:, :, :height, :width])
        flow = self.refine(centre_half, neighbour_half, flow)
        return [*estimates, Estimate(centre_half, neighbour_half, flow, FLOW_STRIDE // 2)]

    def forward(self, lr_window: Tensor) -> tuple[Tensor, Tensor]:
        """Align a window.

        Args:
            lr_window: (N, 3, H, W, 3) uint8 RGB; H and W multiples of 4.

        Returns:
            flow: (N, 4, H/4, W/4) float32, see ``spec.FLOW``.
            aligned: (N, 9, H, W) float32, 0..1, see ``spec.ALIGNED``.
        """
        flow, aligned, _ = self.align(frames_from_window(lr_window))
        return flow, aligned

    def align(self, frames: Tensor) -> tuple[Tensor, Tensor, list[Estimate]]:
        """As ``forward``, from (N, 3, 3, H, W) float32 frames, 0..1; and the estimates of all 2N pairs."""
        n, _, c, h, w = frames.shape
        centre = frames[:, 1]
        # Both neighbours share the batch axis, so the network runs once for the pair.
        neighbours = frames[:, ::2].reshape(2 * n, c, h, w)
        estimates = self.estimate(torch.stack((centre, centre), dim=1).reshape(2 * n, c, h, w), neighbours)
        flow_half = estimates[-1].flow
        warped = backward_warp(neighbours, upsample_flow(flow_half)).reshape(n, 2 * c, h, w)
        aligned = torch.cat((warped[:, :c], centre, warped[:, c:]), dim=1)
        flow = 0.5 * F.avg_pool2d(flow_half, 2)
        return flow.reshape(n, 4, h // 4, w // 4), aligned, estimates
