"""The first stage: optical flow, and the neighbors aligned by it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.network.flow import LucasKanade, backward_warp, grayscale, nearest_sample, upsample_flow
from export.network.frames import frames_from_window, to_uint8
from export.spec import FLOW_STRIDE, NEUTRAL, PHASES, SCALE, WINDOW

LEVELS = 5  # coarse to fine: flow at 1/32 to 1/2 of the resolution; each level steps MAX_STEP px at most:
REACH_PX = 31.0  # 16 + 8 + 4 + 2 + 1: the longest motion that can be found, along either axis
MULTIPLE = 2**LEVELS  # frames are padded to this many pixels so that every halving is exact
RESIDUAL_GAIN = 2.0  # the residual's byte then spans +-1/4 of white: more is misalignment, not detail


def neighbor_residual(reference: Tensor, neighbor: Tensor, flow: Tensor) -> Tensor:
    """Samples of a neighbor minus the interpolated reference frame, by their sub-pixel position.

    Warping interpolates, and so loses what super-resolution from several frames needs: samples of the scene
    at other places. Here the neighbor's nearest sample is kept for each pixel: its difference from the
    reference frame, interpolated at the place of the sample (in a Kalman filter, the innovation), divided
    bilinearly among the sub-pixels around that place. Convolving these with one set of weights filters every
    sub-pixel phase in its own way.

    Args:
        reference: (M, 1, H, W) float32, gray center frames, 0..1.
        neighbor: same, neighbors.
        flow: (M, 2, H, W) float32 from ``reference`` to ``neighbor``, in pixels.

    Returns:
        (M, 16, H, W) float32, -127..127: difference in gray levels times ``RESIDUAL_GAIN``; sub-pixels in the
        order of a pixel shuffle, row by row.
    """
    sample, offset = nearest_sample(neighbor, flow)
    # In sub-pixels, as their bilinear shares count distances.
    centers = (torch.arange(SCALE, dtype=flow.dtype, device=flow.device) + (1 - SCALE) / 2).view(SCALE, 1, 1)
    across, down = (F.relu(1 - (SCALE * side - centers).abs()) for side in offset.split(1, dim=1))
    # After the shares: of what an operator takes, ONNX Runtime makes the last in the file first, and so keeps
    # one plane while it warps, not eight.
    residual = 255 * RESIDUAL_GAIN * (sample - backward_warp(reference, offset))
    residual = residual.clamp(1 - NEUTRAL, NEUTRAL - 1)
    return (residual * down)[:, :, None].mul(across[:, None]).flatten(1, 2)


class FlowAlign(nn.Module):
    """One flow per neighbor, estimated on reduced images, reused at every scale (paper 1, MSFA simplified).

    Lucas-Kanade steps find it coarse to fine, without a weight to train. A learned correction at the finest
    level, trained on crops, whose motion is small, won 0.003 dB on validation clips and cost one of them,
    where motion is fast, 0.4 dB; at coarser levels, corrections did more harm.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flow_estimator = LucasKanade()

    def estimate(self, gray: Tensor) -> Tensor:
        """Flows from the center to its neighbors: of the 2N pairs, (2N, 2, H/2, W/2), in its own pixels.

        Args:
            gray: (N, 3, 1, H, W) float32, 0..1; H and W multiples of 4.
        """
        height, width = gray.shape[-2:]
        # As the difference to a whole multiple, not as a remainder: the exporter and TensorRT-RTX then see
        # that every halving of a padded side is exact, without which the latter compiles no range of sizes.
        below, right = ((side + MULTIPLE - 1) // MULTIPLE * MULTIPLE - side for side in (height, width))
        pyramid = [F.pad(gray.flatten(1, 2), (0, right, 0, below), "replicate")]
        for _ in range(LEVELS - 1):
            pyramid.append(F.avg_pool2d(pyramid[-1], 2))
        pyramid = [self.flow_estimator.blur(level) for level in pyramid]

        reference, neighbor = _pairs(pyramid[-1].unsqueeze(2))
        # One step at each level: a second costs a quarter of the stage, and won nothing on validation clips.
        flow = torch.zeros_like(F.avg_pool2d(reference, 2)).expand(-1, 2, -1, -1)
        flow = self.flow_estimator(reference, neighbor, flow)
        for level in reversed(pyramid[:-1]):
            flow = self.flow_estimator(*_pairs(level.unsqueeze(2)), upsample_flow(flow))
        return flow[:, :, : height // 2, : width // 2]

    def forward(self, lr_window: Tensor) -> tuple[Tensor, Tensor]:
        """Align a window.

        Args:
            lr_window: (N, 3, H, W, 3) uint8 RGB; H and W multiples of 4.

        Returns:
            flow: (N, 4, H/4, W/4) float32, see ``spec.FLOW``.
            aligned: (N, 37, H, W) uint8, see ``spec.ALIGNED``.
        """
        half_flow, warped, residual = self._align(grayscale(frames_from_window(lr_window)))
        center = lr_window[:, 1].permute(0, 3, 1, 2)
        residual = (NEUTRAL + residual).round().to(torch.uint8)
        return _served_flow(half_flow), torch.cat((center, to_uint8(warped), residual), dim=1)

    def align(self, frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As ``forward``, but from float frames and not rounded.

        Args:
            frames: (N, 3, 3, H, W) float32, 0..1; H and W multiples of 4.

        Returns:
            flow: (N, 4, H/4, W/4) float32, see ``spec.FLOW``.
            aligned: (N, 37, H, W) float32, 0..1.
            half_flow: (2N, 2, H/2, W/2) float32, see ``estimate``.
        """
        half_flow, warped, residual = self._align(grayscale(frames))
        aligned = torch.cat((frames[:, 1], warped, (NEUTRAL + residual) / 255), dim=1)
        return _served_flow(half_flow), aligned, half_flow

    def _align(self, gray: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Half flow; (N, 2, H, W) gray neighbors warped, 0..1; (N, 32, H, W) neighbor residual."""
        n, _, _, h, w = gray.shape
        half_flow = self.estimate(gray)
        flow = upsample_flow(half_flow)
        reference, neighbor = _pairs(gray)
        warped = backward_warp(neighbor, flow).reshape(n, WINDOW - 1, h, w)
        residual = neighbor_residual(reference, neighbor, flow).reshape(n, (WINDOW - 1) * PHASES, h, w)
        return half_flow, warped, residual


def _served_flow(half_flow: Tensor) -> Tensor:
    """(2N, 2, H/2, W/2) -> (N, 4, H/4, W/4), see ``spec.FLOW``."""
    m, _, h, w = half_flow.shape
    flow = 0.5 * F.avg_pool2d(half_flow, 2)
    factor = FLOW_STRIDE // 2
    return flow.reshape(m // (WINDOW - 1), 2 * (WINDOW - 1), h // factor, w // factor)


def _pairs(frames: Tensor) -> tuple[Tensor, Tensor]:
    """(N, 3, C, h, w) -> center and neighbor of 2N pairs, (2N, C, h, w) each: both run at once."""
    neighbors = frames[:, ::2]
    return frames[:, 1:2].expand_as(neighbors).flatten(0, 1), neighbors.flatten(0, 1)
