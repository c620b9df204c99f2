"""Conversion between the uint8 images of the boundary and float images."""

from __future__ import annotations

import torch
from torch import Tensor


def frames_from_window(lr_window: Tensor) -> Tensor:
    """Turn decoder frames into network input.

    Args:
        lr_window: (N, 3, H, W, 3) uint8 RGB, 0..255.

    Returns:
        (N, 3, 3, H, W) float32, frames then RGB, 0..1.
    """
    return lr_window.permute(0, 1, 4, 2, 3).float() / 255


def to_uint8(image: Tensor) -> Tensor:
    """Clamp and round: floating point, nominally 0..1 -> uint8, 0..255, of the same shape."""
    return (image.clamp(0, 1) * 255).round().to(torch.uint8)
