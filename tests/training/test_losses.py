"""Losses: flicker is punished and motion is not; what each pixel loss makes of an error."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from export.network.flow import grayscale
from export.training import config
from export.training.losses import (
    LUMA_WEIGHT,
    MSE_WEIGHT,
    PIXEL_LOSSES,
    charbonnier_luma,
    charbonnier_mse,
    temporal_loss,
)


def test_temporal_loss_sees_flicker_and_not_motion() -> None:
    """Of a picture that moves by (8, 0) hr pixels: errors that move along cost nothing."""
    noise = torch.rand(1, 3, 16, 20, generator=torch.Generator().manual_seed(0))
    wide = F.interpolate(noise, scale_factor=8, mode="bicubic").clamp(0, 1)  # (1, 3, 128, 160)
    n, k, h, w = 1, 3, 128, 128

    def moving(picture: torch.Tensor) -> torch.Tensor:
        return torch.stack([picture[..., 8 * t : 8 * t + w] for t in range(k)], 1)

    flow = torch.zeros(2 * n * k, 2, h // 8, w // 8)  # to t-1, to t+1 for each of three windows
    flow[0::2, 0], flow[1::2, 0] = 1, -1  # of 8 hr pixels
    lr = torch.rand(n * k, 3, h // 4, w // 4)
    grey = grayscale(lr)
    aligned = torch.cat((lr, grey, grey), 1)
    error = torch.randn(wide.shape, generator=torch.Generator().manual_seed(1))
    still = error[:, None, :, :, :w].expand(n, k, -1, -1, -1)
    blinking = moving(error) * torch.tensor([1.0, -1.0, 1.0]).view(1, k, 1, 1, 1)
    along = moving(error)

    def loss(errors: torch.Tensor, aligned: torch.Tensor = aligned) -> float:
        return float(temporal_loss(errors, flow, aligned))

    # Borders repeat, and so what came into view at the edge is missed: 8 of 128 columns.
    assert loss(along) < 0.1 * loss(still)
    assert loss(blinking) > 1.2 * loss(still)
    torn = torch.cat((lr, grey, grey + 0.5), 1)
    assert loss(blinking, torn) == 0
    half = torn.clone()
    half[..., : w // 8] = aligned[..., : w // 8]
    left = blinking.clone()
    left[..., w // 2 + 8 :] *= 100
    assert loss(left, half) < 2 * loss(blinking)


def test_pixel_losses_differ_in_what_they_make_of_an_error() -> None:
    truth, off = torch.zeros(1, 48, 8, 8), torch.full((1, 48, 8, 8), 0.1)
    assert tuple(PIXEL_LOSSES) == config.PIXEL_LOSSES
    assert PIXEL_LOSSES["charbonnier"](off, truth) == pytest.approx(0.1, rel=1e-3)
    assert PIXEL_LOSSES["mse"](off, truth) == pytest.approx(0.01)
    assert charbonnier_mse(off, truth) == pytest.approx(0.1 + MSE_WEIGHT * 0.01, rel=1e-3)
    assert charbonnier_luma(off, truth) == pytest.approx(0.1 + LUMA_WEIGHT * 0.01, rel=1e-3)
    green = F.pad(off[:, 16:32], (0, 0, 0, 0, 16, 16))  # sub-pixels of one color are neighbours
    assert charbonnier_luma(green, truth) == pytest.approx(0.1 / 3 + LUMA_WEIGHT * 0.01 * 0.587**2, rel=2e-2)
