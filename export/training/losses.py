"""What training minimises."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from export.network.flow_align import Estimate
from export.network.lucas_kanade import luma
from export.network.warp import backward_warp
from export.spec import CHANNELS, FLOW_STRIDE, SCALE, Size

EPSILON = 1e-3  # Charbonnier's rounding of L1 at zero, in units of the image range
SQUARED_WEIGHT = 30.0  # of the squared error, beside Charbonnier's distance
LUMA_WEIGHT = 60.0  # of the luma's, where it takes the place of that
EDGE_SHARPNESS = 10.0  # how fast an image edge excuses a jump of the flow
MISALIGNED = 0.05  # warp error of lr frames, mean over 3x3 pixels, from which the flow is not believed


def charbonnier(a: Tensor, b: Tensor) -> Tensor:
    """Mean of sqrt((a - b)^2 + epsilon^2): L1 with a smooth minimum."""
    return torch.sqrt((a - b) ** 2 + EPSILON**2).mean()


def mixed(a: Tensor, b: Tensor) -> Tensor:
    """Charbonnier's distance and the squared error: neither few large errors nor many small ones rule."""
    return charbonnier(a, b) + SQUARED_WEIGHT * F.mse_loss(a, b)


def luminous(a: Tensor, b: Tensor) -> Tensor:
    """As ``mixed``, but squared is the error of the luma, the Y of PSNR-Y; of (N, 48, h, w) sub-pixels."""
    error = luma((a - b).unflatten(1, (CHANNELS, SCALE**2)).transpose(1, 2))
    return charbonnier(a, b) + LUMA_WEIGHT * error.square().mean()


PIXEL_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "charbonnier": charbonnier,
    "mixed": mixed,
    "squared": F.mse_loss,
    "luma": luminous,
}
"""Where an answer is in doubt, the first asks for the median of what it may be, the last for the mean, as
PSNR does."""


def flow_loss(estimate: Estimate, smoothness: float) -> Tensor:
    """Warp loss, plus edge-aware total variation: no torn motion (paper 1).

    Args:
        estimate: from ``FlowAlign.align``.
        smoothness: weight of the total variation.
    """
    centre, neighbour, flow = estimate
    warp = charbonnier(backward_warp(neighbour, flow), centre)
    return warp + smoothness * _edge_aware_variation(flow, centre)


def motion_loss(estimate: Estimate, motion: Tensor, lr_size: Size) -> Tensor:
    """Mean error of the flow, in its pixels, where the motion is known.

    Args:
        estimate: from ``FlowAlign.align``, for N windows.
        motion: (N, 2, 2, 3), see ``windows.Batch``; rows of NaN are left out.
        lr_size: (height, width) of the lr frames.
    """
    motion = motion.flatten(0, 1)
    known = ~motion.isnan().any(-1).any(-1)
    if not known.any():
        return motion.new_zeros(())
    flow = estimate.flow[known]
    stride = lr_size[0] // flow.shape[-2]
    return charbonnier(flow, true_flow(motion[known], lr_size, stride, flow.shape[-2:]))


def temporal_loss(errors: Tensor, flow: Tensor, aligned: Tensor) -> Tensor:
    """Flicker: how far what is wrong in one answer does not move with the picture into the next.

    The error of answer t+1, warped to t by the network's own flow, is compared with that of answer t. Errors
    and not answers: warping blurs, so that sharp answers that move as the truth does would be punished.
    Where the lr frames do not fit under the flow (what is covered, what the flow misses), nothing is asked.

    Args:
        errors: (N, K, 3, H, W), answers less truth of K consecutive hr frames.
        flow: (2NK, 2, H/8, W/8), of the ``Estimate`` for their windows; only used, not taught.
        aligned: (NK, 37, H/4, W/4) float32, 0..1, see ``spec.ALIGNED``.
    """
    n, k, _, h, w = errors.shape
    # The last answer of a crop has no next; of each window's two neighbours the second is the next frame.
    to_next = flow.detach().unflatten(0, (n, k, 2))[:, :-1, 1].flatten(0, 1)
    unit = SCALE * FLOW_STRIDE // 2  # hr pixels per pixel of a flow at half the lr resolution
    to_next = unit * F.interpolate(to_next, scale_factor=float(unit), mode="bilinear", align_corners=False)
    frames = aligned.detach().unflatten(0, (n, k))[:, :-1].flatten(0, 1)
    centre, _, warped = frames[:, : CHANNELS + 2].split((CHANNELS, 1, 1), dim=1)
    misfit = (warped - luma(centre)).abs()
    fits = F.avg_pool2d(misfit, 3, stride=1, padding=1, count_include_pad=False) < MISALIGNED
    mask = F.interpolate(fits.float(), size=(h, w), mode="nearest")
    moved = backward_warp(errors[:, 1:].flatten(0, 1), to_next)
    flicker = torch.sqrt((moved - errors[:, :-1].flatten(0, 1)) ** 2 + EPSILON**2)
    return (mask * flicker).sum() / (CHANNELS * mask.sum()).clamp(min=1)


def true_flow(motion: Tensor, lr_size: Size, stride: int, size: Sequence[int]) -> Tensor:
    """The flow of affine motions.

    Args:
        motion: (M, 2, 3): where a point of the centre frame lies in the neighbour; (x, y) run from -1 to 1
            between the frame's edges.
        lr_size: (height, width) of the lr frames.
        stride: lr pixels per pixel of the answer.
        size: (height, width) of the answer; may overhang the frame.

    Returns:
        (M, 2, *size) in pixels of the answer.
    """
    extent = torch.tensor([lr_size[1], lr_size[0]], dtype=motion.dtype, device=motion.device) / stride
    y, x = (torch.arange(side, dtype=motion.dtype, device=motion.device) + 0.5 for side in size)
    points = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1) * 2 / extent - 1  # (h, w, 2)
    moved = torch.einsum("mij,hwj->mhwi", motion[:, :, :2], points) + motion[:, None, None, :, 2]
    return ((moved - points) * extent / 2).permute(0, 3, 1, 2)


def _edge_aware_variation(flow: Tensor, image: Tensor) -> Tensor:
    total = flow.new_zeros(())
    for axis in (-1, -2):
        if flow.shape[axis] > 1:
            jump = flow.diff(dim=axis).abs().mean(1)
            edge = image.diff(dim=axis).abs().mean(1)
            total = total + (jump * torch.exp(-EDGE_SHARPNESS * edge)).mean()
    return total
