"""Pixel losses, and the temporal loss against flicker."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from export.network.flow import backward_warp, grayscale
from export.spec import CHANNELS, FLOW_STRIDE, SCALE

EPSILON = 1e-3  # Charbonnier's rounding of L1 at zero, in units of the image range
MSE_WEIGHT = 30.0  # of the squared error, beside the Charbonnier loss
LUMA_WEIGHT = 60.0  # of the squared error of the luma, instead of that
MISALIGNED = 0.05  # warp error of lr frames, mean over 3x3 pixels, from which the flow is not trusted


def charbonnier(a: Tensor, b: Tensor) -> Tensor:
    """Mean of sqrt((a - b)^2 + epsilon^2): L1 with a smooth minimum."""
    return torch.sqrt((a - b) ** 2 + EPSILON**2).mean()


def charbonnier_mse(a: Tensor, b: Tensor) -> Tensor:
    """Charbonnier loss plus squared error: neither few large errors nor many small ones dominate."""
    return charbonnier(a, b) + MSE_WEIGHT * F.mse_loss(a, b)


def charbonnier_luma(a: Tensor, b: Tensor) -> Tensor:
    """Charbonnier loss plus the squared error of the luma, the Y of PSNR-Y; of (N, 48, h, w) sub-pixels."""
    error = grayscale((a - b).unflatten(1, (CHANNELS, SCALE**2)).transpose(1, 2))
    return charbonnier(a, b) + LUMA_WEIGHT * error.square().mean()


PIXEL_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "charbonnier": charbonnier,
    "charbonnier_mse": charbonnier_mse,
    "mse": F.mse_loss,
    "charbonnier_luma": charbonnier_luma,
}
"""By name. Where several answers are likely, ``charbonnier`` is least at their median, ``mse`` at their mean,
as PSNR asks."""


def temporal_loss(errors: Tensor, flow: Tensor, aligned: Tensor) -> Tensor:
    """Flicker: how far the error of one answer, moved along with the picture, differs from that of the next.

    The error of answer t+1, warped to t by the network's own flow, is compared with that of answer t. Errors
    and not answers: warping blurs, so that sharp answers that move as the truth does would be punished.
    Where the warped lr frames differ (occlusions, wrong flow), it is masked.

    Args:
        errors: (N, K, 3, H, W), answers less truth of K consecutive hr frames.
        flow: (2NK, 2, H/8, W/8), half flow of their windows, see ``FlowAlign.align``; used, not trained.
        aligned: (NK, 37, H/4, W/4) float32, 0..1, see ``spec.ALIGNED``.
    """
    n, k, _, h, w = errors.shape
    # The last answer of a crop has no next; of each window's two neighbors the second is the next frame.
    to_next = flow.detach().unflatten(0, (n, k, 2))[:, :-1, 1].flatten(0, 1)
    unit = SCALE * FLOW_STRIDE // 2  # hr pixels per pixel of a flow at half the lr resolution
    to_next = unit * F.interpolate(to_next, scale_factor=float(unit), mode="bilinear", align_corners=False)
    frames = aligned.detach().unflatten(0, (n, k))[:, :-1].flatten(0, 1)
    center, _, warped = frames[:, : CHANNELS + 2].split((CHANNELS, 1, 1), dim=1)
    misfit = (warped - grayscale(center)).abs()
    fits = F.avg_pool2d(misfit, 3, stride=1, padding=1, count_include_pad=False) < MISALIGNED
    mask = F.interpolate(fits.float(), size=(h, w), mode="nearest")
    moved = backward_warp(errors[:, 1:].flatten(0, 1), to_next)
    flicker = torch.sqrt((moved - errors[:, :-1].flatten(0, 1)) ** 2 + EPSILON**2)
    return (mask * flicker).sum() / (CHANNELS * mask.sum()).clamp(min=1)
