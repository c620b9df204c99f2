"""What training minimises."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from export.network.flow_align import Estimate
from export.network.warp import backward_warp
from export.spec import Size

EPSILON = 1e-3  # Charbonnier's rounding of L1 at zero, in units of the image range
EDGE_SHARPNESS = 10.0  # how fast an image edge excuses a jump of the flow


def charbonnier(a: Tensor, b: Tensor) -> Tensor:
    """Mean of sqrt((a - b)^2 + epsilon^2): L1 with a smooth minimum."""
    return torch.sqrt((a - b) ** 2 + EPSILON**2).mean()


def flow_loss(estimates: Sequence[Estimate], smoothness: float) -> Tensor:
    """Warp loss at every level, plus edge-aware total variation: no torn motion (paper 1).

    Args:
        estimates: of all levels, from ``FlowAlign.align``.
        smoothness: weight of the total variation.
    """
    losses = [
        charbonnier(backward_warp(level.neighbour, level.flow), level.centre)
        + smoothness * _edge_aware_variation(level.flow, level.centre)
        for level in estimates
    ]
    return torch.stack(losses).mean()


def motion_loss(estimates: Sequence[Estimate], motion: Tensor, lr_size: Size) -> Tensor:
    """Mean error of the flow, in pixels of each level, where the motion is known.

    Args:
        estimates: of all levels, from ``FlowAlign.align``, for N windows.
        motion: (N, 2, 2, 3), see ``windows.Batch``; rows of NaN are left out.
        lr_size: (height, width) of the lr frames.
    """
    motion = motion.flatten(0, 1)
    known = ~motion.isnan().any(-1).any(-1)
    if not known.any():
        return motion.new_zeros(())
    losses = [
        charbonnier(level.flow[known], true_flow(motion[known], lr_size, level.stride, level.flow.shape[-2:]))
        for level in estimates
    ]
    return torch.stack(losses).mean()


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
