"""A step of Lucas and Kanade: what calculus can tell of the flow need not be learned.

Lucas and Kanade 1981, "An iterative image registration technique", with the mean slope of both images, coarse
to fine by its caller. No parameter is trained and no convolution of any width is spent: it costs a few passes
over grey images.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export import spec
from export.network.warp import backward_warp, upsample_flow

LUMA = (0.299, 0.587, 0.114)  # BT.601: one channel tells nearly all that three do about motion
PREFILTER = 0.8  # sigma, px: slopes of unfiltered frames are mostly noise
WINDOW = 1.2  # sigma, px of the flow: the neighbourhood that is assumed to move as one
SMOOTHING = 0.8  # sigma, px of the flow: outliers are outvoted by their neighbours
DAMPING = 3e-5  # added to squared slopes, white = 1: flat areas keep their flow
MAX_STEP = 1.0  # px of the images: slopes say nothing about what lies farther; coarser levels do


def luma(image: Tensor) -> Tensor:
    """(..., 3, h, w) RGB -> (..., 1, h, w)."""
    red, green, blue = image.split(1, dim=-3)
    return LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue


def _gauss(sigma: float, channels: int) -> Tensor:
    """Weights (channels, 1, 3, 3) that blur each channel."""
    taps = torch.exp(-torch.tensor([1.0, 0.0, 1.0]) / (2 * sigma**2))
    return torch.outer(taps, taps).div(taps.sum() ** 2).expand(channels, 1, 3, 3).clone()


def _filter(image: Tensor, weight: Tensor) -> Tensor:
    """(M, C, h, w), each channel by its own share of ``weight``; borders repeat."""
    return F.conv2d(F.pad(image, (1, 1, 1, 1), "replicate"), weight, groups=image.shape[1])


def _slopes(image: Tensor) -> tuple[Tensor, Tensor]:
    """Central differences of (M, 1, h, w) along x and along y, per pixel; borders repeat."""
    padded = F.pad(image, (1, 1, 1, 1), "replicate") / 2
    across = padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]
    down = padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]
    return across, down


class LucasKanade(nn.Module):
    """Moves flows towards those under which images agree."""

    prefilter: Tensor
    window: Tensor
    smoothing: Tensor

    def __init__(self) -> None:
        """Nothing to learn."""
        super().__init__()
        filters = {
            "prefilter": _gauss(PREFILTER, spec.WINDOW),
            "window": _gauss(WINDOW, 5),
            "smoothing": _gauss(SMOOTHING, 2),
        }
        for name, weight in filters.items():
            self.register_buffer(name, weight, persistent=False)

    def blur(self, frames: Tensor) -> Tensor:
        """What ``forward`` wants done to its images: (N, 3, h, w) grey frames, blurred by ``PREFILTER``."""
        return _filter(frames, self.prefilter)

    def forward(self, still: Tensor, moving: Tensor, flow: Tensor) -> Tensor:
        """Take one step from flows of half the images' resolution.

        Args:
            still: (M, 1, 2h, 2w) float32 grey images, 0..1, from ``blur``.
            moving: same, their neighbours.
            flow: (M, 2, h, w) float32, from still to moving, in pixels of its own resolution.

        Returns:
            (M, 2, h, w): ``flow`` plus a step that gradients do not pass through: training sees a sum.
        """
        start = flow.detach()
        warped = backward_warp(moving, upsample_flow(start))
        difference = warped - still
        # The mean slope of both images makes the step exact to second order.
        x, y = _slopes((still + warped) / 2)
        products = torch.cat((x * x, x * y, y * y, x * difference, y * difference), dim=1)
        xx, xy, yy, xd, yd = _filter(F.avg_pool2d(products, 2), self.window).split(1, dim=1)
        xx, yy = xx + DAMPING, yy + DAMPING
        step = torch.cat((xy * yd - yy * xd, xy * xd - xx * yd), dim=1) / (xx * yy - xy * xy)
        step = step.clamp(-MAX_STEP, MAX_STEP) / 2  # in pixels of the flow
        return flow + (_filter(start + step, self.smoothing) - start)
