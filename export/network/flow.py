"""Optical flow: warping by it, and its estimation by steps of Lucas and Kanade.

Lucas and Kanade 1981, "An iterative image registration technique", with the mean slope of both images, coarse
to fine by its caller. No parameter is trained and no convolution of any width is spent: it costs a few passes
over gray images. ``backward_warp`` is the one place where pixel coordinates become ``grid_sample``'s.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export import spec

GRAY_WEIGHTS = (0.299, 0.587, 0.114)  # BT.601: one channel tells nearly all that three do about motion
PREFILTER_SIGMA = 0.8  # px: slopes of unfiltered frames are mostly noise
WINDOW_SIGMA = 1.2  # px of the flow: the neighborhood that is assumed to move as one
SMOOTHING_SIGMA = 0.8  # px of the flow: outliers are outvoted by their neighbors
DAMPING = 3e-5  # added to squared slopes, white = 1: flat areas keep their flow
MAX_STEP = 1.0  # px of the images: slopes say nothing about what lies farther; coarser levels do


def upsample_flow(flow: Tensor) -> Tensor:
    """Double the resolution of a flow (N, 2, h, w), and with it its unit."""
    return 2 * F.interpolate(flow, scale_factor=2.0, mode="bilinear", align_corners=False)


def backward_warp(image: Tensor, flow: Tensor) -> Tensor:
    """Sample ``image`` where ``flow`` points, so that it lines up with the frame the flow starts from.

    Sampled in FP32 whatever the image's type: FP16 coordinates step 0.31 px at width 1280.

    Args:
        image: (N, C, H, W), floating point.
        flow: (N, 2, H, W) float32, displacement in pixels of its own resolution, channel 0 = x.

    Returns:
        (N, C, H, W): ``image(x + flow)``, bilinear; positions outside repeat the border.
    """
    return _sample(image, flow, "bilinear")


def nearest_sample(image: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
    """The sample of ``image`` nearest to where ``flow`` points, uninterpolated, and where it really lies.

    Args:
        image: (N, C, H, W), floating point.
        flow: (N, 2, H, W) float32, displacement in pixels, channel 0 = x.

    Returns:
        sample: (N, C, H, W); positions outside repeat the border.
        offset: (N, 2, H, W) float32, -1/2..1/2: from where ``flow`` points to the sample, in pixels.
    """
    whole = flow.detach().round()
    return _sample(image, whole, "nearest"), whole - flow


def _sample(image: Tensor, flow: Tensor, mode: str) -> Tensor:
    height, width = image.shape[-2:]
    x = torch.arange(width, device=flow.device, dtype=flow.dtype) + flow[:, 0]
    y = torch.arange(height, device=flow.device, dtype=flow.dtype).unsqueeze(1) + flow[:, 1]
    # With align_corners=False pixel centers lie at (2i + 1) / size - 1; valid for a side of 1 too.
    grid = torch.stack(((2 * x + 1) / width - 1, (2 * y + 1) / height - 1), dim=-1)
    warped = F.grid_sample(image.float(), grid, mode=mode, padding_mode="border", align_corners=False)
    return warped.to(image.dtype)


def grayscale(image: Tensor) -> Tensor:
    """(..., 3, h, w) RGB -> (..., 1, h, w), of the same range: what flow is estimated on."""
    red, green, blue = image.split(1, dim=-3)
    return GRAY_WEIGHTS[0] * red + GRAY_WEIGHTS[1] * green + GRAY_WEIGHTS[2] * blue


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

    def __init__(self, frames: int = spec.WINDOW) -> None:
        """Nothing to learn; ``frames`` are blurred at once."""
        super().__init__()
        filters = {
            "prefilter": _gauss(PREFILTER_SIGMA, frames),
            "window": _gauss(WINDOW_SIGMA, 5),
            "smoothing": _gauss(SMOOTHING_SIGMA, 2),
        }
        for name, weight in filters.items():
            self.register_buffer(name, weight, persistent=False)

    def blur(self, frames: Tensor) -> Tensor:
        """Prepare images for ``forward``: (N, frames, h, w) gray frames, blurred by ``PREFILTER_SIGMA``."""
        return _filter(frames, self.prefilter)

    def forward(self, reference: Tensor, neighbor: Tensor, flow: Tensor) -> Tensor:
        """Take one step from flows of half the images' resolution.

        Args:
            reference: (M, 1, 2h, 2w) float32 gray images, 0..1, from ``blur``.
            neighbor: same, of the frames that flow is estimated to.
            flow: (M, 2, h, w) float32, from reference to neighbor, in pixels of its own resolution.

        Returns:
            (M, 2, h, w): ``flow`` plus a step that gradients do not pass through: training sees a sum.
        """
        start = flow.detach()
        warped = backward_warp(neighbor, upsample_flow(start))
        difference = warped - reference
        # The mean slope of both images makes the step exact to second order.
        x, y = _slopes((reference + warped) / 2)
        products = torch.cat((x * x, x * y, y * y, x * difference, y * difference), dim=1)
        xx, xy, yy, xd, yd = _filter(F.avg_pool2d(products, 2), self.window).split(1, dim=1)
        xx, yy = xx + DAMPING, yy + DAMPING
        step = torch.cat((xy * yd - yy * xd, xy * xd - xx * yd), dim=1) / (xx * yy - xy * xy)
        step = step.clamp(-MAX_STEP, MAX_STEP) / 2  # in pixels of the flow
        return flow + (_filter(start + step, self.smoothing) - start)
