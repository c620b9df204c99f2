"""What several peers are made of, and how their checkpoints are loaded."""

from __future__ import annotations

from pathlib import Path

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
    """x + conv2(relu(conv1(x))), without normalisation (EDSR, section 3.1)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(channels, channels)
        self.conv2 = conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, h, w) -> same."""
        return x + self.conv2(F.relu(self.conv1(x)))


class Reconstruction(nn.Module):
    """EDVR's and BasicVSR's tail: two x2 shuffles, two convolutions at full size, a bilinear skip."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.upconv1 = conv3x3(channels, 4 * channels)
        self.upconv2 = conv3x3(channels, 4 * 64)
        self.conv_hr = conv3x3(64, 64)
        self.conv_last = conv3x3(64, 3)

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


def load(network: nn.Module, path: Path) -> None:
    """Load a published checkpoint; BasicSR has weights under ``params``, DataParallel says ``module.``."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    state = state.get("params_ema", state.get("params", state))
    network.load_state_dict({name.removeprefix("module."): tensor for name, tensor in state.items()})
