"""The stages' common first step: uint8 windows to float frames."""

from __future__ import annotations

from torch import Tensor


def frames_from_window(lr_window: Tensor) -> Tensor:
    """Turn decoder frames into network input.

    Args:
        lr_window: (N, 3, H, W, 3) uint8 RGB, 0..255.

    Returns:
        (N, 3, 3, H, W) float32, frames then RGB, 0..1.
    """
    return lr_window.permute(0, 1, 4, 2, 3).float() / 255
