"""Stage 1, flow alignment: a window of frames in, optical flow and what the neighbours tell out."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.network.frames import frames_from_window, grey_levels
from export.network.lucas_kanade import LucasKanade, luma
from export.network.warp import backward_warp, nearest_sample, upsample_flow
from export.spec import FLOW_STRIDE, NEUTRAL, PHASES, SCALE, WINDOW

LEVELS = 5  # coarse to fine: flow at 1/32 to 1/2 of the resolution; reaches motion of about 60 px
GRANULE = 2**LEVELS  # frames are padded to this many pixels so that every halving is exact
NEWS_GAIN = 2.0  # of the innovation, whose byte then spans +-1/4 of white: more is misalignment, not detail


class Estimate(NamedTuple):
    """A flow (M, 2, h, w), in its own pixels, between two images (M, 3, h, w) of half the lr resolution."""

    centre: Tensor
    neighbour: Tensor
    flow: Tensor


def innovation(still: Tensor, moving: Tensor, flow: Tensor) -> Tensor:
    """What a neighbour's own samples add to the centre frame, sorted by where between its pixels they lie.

    Warping interpolates, and so throws away what super-resolution from several frames lives on: that the
    neighbour sampled the scene at other places. Here each pixel of the centre is told of the neighbour's
    nearest sample as it is: by how much it differs from what the centre interpolates at that very place (in
    a Kalman filter, the innovation), shared out bilinearly among the sub-pixels around the place. Convolving
    these with one set of weights filters every sub-pixel phase in its own way.

    Args:
        still: (M, 1, H, W) float32, grey centre frames, 0..1.
        moving: same, neighbours.
        flow: (M, 2, H, W) float32 from ``still`` to ``moving``, in pixels.

    Returns:
        (M, 16, H, W) float32, -127..127: difference in grey levels times ``NEWS_GAIN``; sub-pixels in the
        order of a pixel shuffle, row by row.
    """
    sample, offset = nearest_sample(moving, flow)
    # In sub-pixels, as their bilinear shares count distances.
    centres = (torch.arange(SCALE, dtype=flow.dtype, device=flow.device) + (1 - SCALE) / 2).view(SCALE, 1, 1)
    across, down = (F.relu(1 - (SCALE * side - centres).abs()) for side in offset.split(1, dim=1))
    # After the shares: of what an operator takes, ONNX Runtime makes the last in the file first, and so keeps
    # one plane while it warps, not eight.
    surprise = (255 * NEWS_GAIN * (sample - backward_warp(still, offset))).clamp(1 - NEUTRAL, NEUTRAL - 1)
    return (surprise * down)[:, :, None].mul(across[:, None]).flatten(1, 2)


class FlowAlign(nn.Module):
    """One flow per neighbour, estimated on reduced images, reused at every scale (paper 1, MSFA simplified).

    Lucas-Kanade steps find it coarse to fine, without a weight to train. A learned correction at the finest
    level, trained on crops, whose motion is small, won 0.003 dB on validation clips and cost one of them,
    where motion is fast, 0.4 dB; at coarser levels, corrections did more harm.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calculus = LucasKanade()

    def estimate(self, frames: Tensor, grey: Tensor) -> Estimate:
        """Flows from the centre to its neighbours: of the 2N pairs, at (H/2, W/2).

        Args:
            frames: (N, 3, 3, H, W) float32, 0..1; H and W multiples of 4.
            grey: (N, 3, 1, H, W), their luma.
        """
        height, width = frames.shape[-2:]
        # As the difference to whole granules, not as a remainder: the exporter and TensorRT-RTX then see that
        # every halving of a padded side is exact, without which the latter compiles no range of sizes.
        below, right = ((side + GRANULE - 1) // GRANULE * GRANULE - side for side in (height, width))
        pyramid = [F.pad(grey.flatten(1, 2), (0, right, 0, below), "replicate")]
        for _ in range(LEVELS - 1):
            pyramid.append(F.avg_pool2d(pyramid[-1], 2))
        pyramid = [self.calculus.blur(level) for level in pyramid]

        still, moving = _pairs(pyramid[-1].unsqueeze(2))
        # One step at each level: a second costs a quarter of the stage, and won nothing on held-back clips.
        flow = self.calculus(still, moving, torch.zeros_like(F.avg_pool2d(still, 2)).expand(-1, 2, -1, -1))
        for level in reversed(pyramid[:-1]):
            flow = self.calculus(*_pairs(level.unsqueeze(2)), upsample_flow(flow))
        flow = flow[:, :, : height // 2, : width // 2]
        half = F.avg_pool2d(frames.flatten(1, 2), 2).unflatten(1, frames.shape[1:3])
        centre, neighbour = _pairs(half)
        return Estimate(centre, neighbour, flow)

    def forward(self, lr_window: Tensor) -> tuple[Tensor, Tensor]:
        """Align a window.

        Args:
            lr_window: (N, 3, H, W, 3) uint8 RGB; H and W multiples of 4.

        Returns:
            flow: (N, 4, H/4, W/4) float32, see ``spec.FLOW``.
            aligned: (N, 37, H, W) uint8, see ``spec.ALIGNED``.
        """
        flow, warped, news, _ = self._compare(frames_from_window(lr_window))
        centre = lr_window[:, 1].permute(0, 3, 1, 2)
        return flow, torch.cat((centre, grey_levels(warped), (NEUTRAL + news).round().to(torch.uint8)), dim=1)

    def align(self, frames: Tensor) -> tuple[Tensor, Tensor, Estimate]:
        """As ``forward``, from (N, 3, 3, H, W) float32 frames, 0..1, and with the estimate of all 2N pairs.

        What is aligned is not rounded: (N, 37, H, W) float32, 0..1.
        """
        flow, warped, news, estimate = self._compare(frames)
        return flow, torch.cat((frames[:, 1], warped, (NEUTRAL + news) / 255), dim=1), estimate

    def _compare(self, frames: Tensor) -> tuple[Tensor, Tensor, Tensor, Estimate]:
        """Flow as in ``spec.FLOW``; (N, 2, H, W) grey neighbours warped, 0..1; (N, 32, H, W) innovation."""
        n, _, _, h, w = frames.shape
        grey = luma(frames)
        estimate = self.estimate(frames, grey)
        flow_half = estimate.flow
        flow_full = upsample_flow(flow_half)
        still, moving = _pairs(grey)
        warped = backward_warp(moving, flow_full).reshape(n, WINDOW - 1, h, w)
        news = innovation(still, moving, flow_full).reshape(n, (WINDOW - 1) * PHASES, h, w)
        flow = 0.5 * F.avg_pool2d(flow_half, 2)
        return flow.reshape(n, 4, h // FLOW_STRIDE, w // FLOW_STRIDE), warped, news, estimate


def _pairs(frames: Tensor) -> tuple[Tensor, Tensor]:
    """(N, 3, C, h, w) -> centre and neighbour of 2N pairs, (2N, C, h, w) each: both run at once."""
    neighbours = frames[:, ::2]
    return frames[:, 1:2].expand_as(neighbours).flatten(0, 1), neighbours.flatten(0, 1)
