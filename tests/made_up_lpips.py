"""Weights of LPIPS in the published layouts: sines, which no generator of random numbers can change."""

from pathlib import Path

import torch

from export.metrics.lpips import BACKBONE_FILE, HEADS_FILE, Lpips


def __waves(index: int, shape: torch.Size, frequency: float, scale: float) -> torch.Tensor:
    values = (torch.arange(shape.numel(), dtype=torch.float64) * (frequency + index)).sin() * scale
    return values.float().view(shape)


def _waves(index: int, shape: torch.Size, frequency: float, scale: float) -> torch.Tensor:
    values = (torch.arange(shape.numel(), dtype=torch.float64) * (frequency + index)).sin() * scale
    return values.float().view(shape)


def write_weights(folder: Path) -> None:
    lpips = Lpips()
    backbone = {
        name: _waves(i, p.shape, 0.7, (3 / p[0].numel()) ** 0.5)
        for i, (name, p) in enumerate(lpips.backbone.named_parameters())
    }
    heads = {f"lin{i}.model.1.weight": _waves(i, p.shape, 1.3, 1).abs() for i, p in enumerate(lpips.heads)}
    torch.save(backbone, folder / BACKBONE_FILE)
    torch.save(heads, folder / HEADS_FILE)
