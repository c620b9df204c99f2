"""What several peers are made of."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv3x3(c_in: int, c_out: int, stride: int = 1) -> nn.Conv2d:
    """A 3x3 convolution that keeps the size, or halves it."""
    return nn.Conv2d(c_in, c_out, 3, stride, 1)


def leaky(x: Tensor) -> Tensor:
    """The activation of all these networks outside of residual blocks."""
    return F.leaky_relu(x, 0.1)


def upscale(x: Tensor, factor: int) -> Tensor:
    """Bilinear enlargement."""
    return F.interpolate(x, scale_factor=float(factor), mode="bilinear", align_corners=False)


class ResidualBlock(nn.Module):
    """x + conv2(relu(conv1(x))), without normalization (EDSR, section 3.1)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv3x3(channels, channels), conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, h, w) -> same."""
        return x + self.conv2(F.relu(self.conv1(x)))


class Reconstruction(nn.Module):
    """EDVR's and BasicVSR's tail: two x2 shuffles, two convolutions at full size, a bilinear skip."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.upconv1, self.upconv2 = conv3x3(channels, 4 * channels), conv3x3(channels, 4 * 64)
        self.conv_hr, self.conv_last = conv3x3(64, 64), conv3x3(64, 3)

    def reconstruct(self, features: Tensor, frame: Tensor) -> Tensor:
        """(N, C, H, W) features and the (N, 3, H, W) lr frame -> (N, 3, 4H, 4W)."""
        x = leaky(F.pixel_shuffle(self.upconv1(features), 2))
        x = leaky(F.pixel_shuffle(self.upconv2(x), 2))
        return self.conv_last(leaky(self.conv_hr(x))) + upscale(frame, 4)


def backward_warp(image: Tensor, flow: Tensor, padding: str) -> Tensor:
    """``image`` (N, C, H, W) sampled where ``flow`` (N, 2, H, W), in pixels and x first, points."""
    height, width = image.shape[-2:]
    x = torch.arange(width, device=flow.device, dtype=flow.dtype) + flow[:, 0]
    y = torch.arange(height, device=flow.device, dtype=flow.dtype).unsqueeze(1) + flow[:, 1]
    grid = torch.stack(((2 * x + 1) / width - 1, (2 * y + 1) / height - 1), dim=-1)
    return F.grid_sample(image, grid, mode="bilinear", padding_mode=padding, align_corners=False)


def deform_conv(x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, bias: Tensor, groups: int) -> Tensor:
    """Modulated deformable convolution (Zhu et al., CVPR 2019, equation 1): taps move and fade by pixel.

    ``x`` is (N, C, H, W) with zeros outside, ``weight`` (O, C, k, k), ``bias`` (O,). Of each group of
    channels ``offset``, (N, 2 * groups * k * k, H, W), has y, x of the taps in pixels, ``mask`` the weights.
    """
    n, c, h, w = x.shape
    kernel = weight.shape[-1]
    taps = kernel * kernel
    y, x_at = (torch.arange(side, device=x.device, dtype=x.dtype) for side in (h, w))
    reach = torch.arange(kernel, device=x.device, dtype=x.dtype) - kernel // 2
    tap_y, tap_x = (part.reshape(1, taps, 1, 1) for part in torch.meshgrid(reach, reach, indexing="ij"))
    shift = offset.reshape(n * groups, taps, 2, h, w)
    y, x_at = y.view(1, 1, h, 1) + tap_y + shift[:, :, 0], x_at + tap_x + shift[:, :, 1]
    grid = torch.stack(((2 * x_at + 1) / w - 1, (2 * y + 1) / h - 1), dim=-1).view(n * groups, taps * h, w, 2)
    samples = F.grid_sample(x.reshape(n * groups, c // groups, h, w), grid, align_corners=False)
    columns = (samples * mask.reshape(n * groups, 1, taps * h, w)).reshape(n, c * taps, h * w)
    return (weight.reshape(1, -1, c * taps) @ columns).view(n, -1, h, w) + bias.view(1, -1, 1, 1)


class DeformConv(nn.Module):
    """Features warped and filtered at once; where to look is read from other features (EDVR, section 3.2)."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.empty(channels, channels, 3, 3))
        self.bias = nn.Parameter(torch.zeros(channels))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        self.conv_offset = conv3x3(channels, 3 * 9 * groups)

    def forward(self, x: Tensor, where: Tensor) -> Tensor:
        """(N, C, H, W) each -> (N, C, H, W)."""
        offset, mask = self.conv_offset(where).split((2 * 9 * self.groups, 9 * self.groups), dim=1)
        return deform_conv(x, offset, mask.sigmoid(), self.weight, self.bias, self.groups)
