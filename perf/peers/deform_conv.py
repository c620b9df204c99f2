"""Modulated deformable convolution (Zhu et al., CVPR 2019) in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def deform_conv(x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, bias: Tensor, groups: int) -> Tensor:
    """A convolution whose taps move and fade from pixel to pixel (equation 1); stride 1, size kept.

    Args:
        x: (N, C, H, W).
        offset: (N, 2 * groups * K, H, W): y, x of each of the K taps, group after group, in pixels.
        mask: (N, groups * K, H, W): weight of each tap.
        weight: (O, C, k, k), K = k * k, k odd.
        bias: (O,).
        groups: Parts of the channels with offsets of their own.

    Returns:
        (N, O, H, W); outside of the image there are zeros.
    """
    n, c, h, w = x.shape
    kernel = weight.shape[-1]
    taps = kernel * kernel
    reach = torch.arange(kernel, device=x.device, dtype=x.dtype) - kernel // 2
    tap_y, tap_x = (part.reshape(1, taps, 1, 1) for part in torch.meshgrid(reach, reach, indexing="ij"))
    shift = offset.reshape(n * groups, taps, 2, h, w)
    y = torch.arange(h, device=x.device, dtype=x.dtype).view(1, 1, h, 1) + tap_y + shift[:, :, 0]
    x_at = torch.arange(w, device=x.device, dtype=x.dtype) + tap_x + shift[:, :, 1]
    grid = torch.stack(((2 * x_at + 1) / w - 1, (2 * y + 1) / h - 1), dim=-1).view(n * groups, taps * h, w, 2)
    samples = F.grid_sample(x.reshape(n * groups, c // groups, h, w), grid, align_corners=False)
    samples = samples * mask.reshape(n * groups, 1, taps * h, w)
    columns = samples.reshape(n, c * taps, h * w)
    return (weight.reshape(1, -1, c * taps) @ columns).view(n, -1, h, w) + bias.view(1, -1, 1, 1)


class DeformConv(nn.Module):
    """Features warped and filtered at once; where to look is read from other features (EDVR, section 3.2)."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.empty(channels, channels, 3, 3))
        self.bias = nn.Parameter(torch.zeros(channels))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        self.conv_offset = nn.Conv2d(channels, 3 * 9 * groups, 3, padding=1)
        nn.init.zeros_(self.conv_offset.weight)  # untrained: a plain convolution, taps at half weight
        nn.init.zeros_(self.conv_offset.bias)  # type: ignore[arg-type]  # it has one

    def forward(self, x: Tensor, where: Tensor) -> Tensor:
        """(N, C, H, W) each -> (N, C, H, W)."""
        predicted = self.conv_offset(where)
        offset, mask = predicted.split((2 * 9 * self.groups, 9 * self.groups), dim=1)
        return deform_conv(x, offset, mask.sigmoid(), self.weight, self.bias, self.groups)
