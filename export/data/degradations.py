"""Degradations: how lr frames are made from hr ones.

``bi`` and ``bd`` are functions of one frame; ``real`` and ``x264-28`` need a whole sequence, for a codec's
answer depends on the frames before. Nothing is differentiable, and nothing need be: lr frames are data.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from export.data.codecs import Frames, transcode, x264
from export.data.real import real
from export.errors import ExportError
from export.spec import SCALE

BD_SIGMA = 1.6  # hr pixels
BD_RADIUS = 6  # hr pixels: the 13x13 kernel of Jo et al. 2018
NAMES = "bi, bd, real or x264-CRF, such as x264-28"
X264 = re.compile(r"x264-(\d|[1-4]\d|5[01])")


def bi(hr: Tensor) -> Tensor:
    """Bicubic with antialiasing, as MATLAB's imresize: lr pixel (0, 0) covers hr pixels (0..3, 0..3).

    Args:
        hr: (..., 3, 4h, 4w) float32, 0..1.

    Returns:
        (..., 3, h, w) float32, 0..1, multiples of 1/255.
    """
    frames = hr.flatten(0, -4)
    lr = F.interpolate(frames, scale_factor=1 / SCALE, mode="bicubic", antialias=True, align_corners=False)
    return _in_8_bits(lr).unflatten(0, hr.shape[:-3])


def bd(hr: Tensor) -> Tensor:
    """Gaussian blur of sigma 1.6, then every fourth pixel, as the published BD scores have it.

    Shapes and values are those of `bi`.

    Lr pixel (0, 0) is centered on hr pixel (0, 0), and not between four of them as in ``bi``: the lr picture
    lies 1.5 hr pixels away from where ``bi`` puts it. A network for the one must not be scored on the other.
    """
    x = torch.arange(-BD_RADIUS, BD_RADIUS + 1, device=hr.device, dtype=hr.dtype)
    kernel = torch.exp(-((x / BD_SIGMA) ** 2) / 2)
    kernel = kernel / kernel.sum()
    frames = hr.flatten(0, -3).unsqueeze(1)
    padded = F.pad(frames, (BD_RADIUS,) * 4, mode="reflect")
    rows = F.conv2d(padded, kernel.view(1, 1, -1, 1), stride=(SCALE, 1))
    lr = F.conv2d(rows, kernel.view(1, 1, 1, -1), stride=(1, SCALE))
    return _in_8_bits(lr).squeeze(1).unflatten(0, hr.shape[:-2])


def check_degradation(name: str) -> None:
    """Raises ExportError if there is no such degradation."""
    if name not in ("bi", "bd", "real") and not X264.fullmatch(name):
        raise ExportError(f"expected a degradation among {NAMES}, found {name!r}")


def degrade(name: str, truth: Frames, seed: int = 0) -> Frames:
    """Lr frames of a whole clip.

    Args:
        name: ``bi``, ``bd``, ``real`` (see `export.data.real`), or ``x264-28``: ``bi``, then H.264 of CRF 28.
        truth: (T, 4h, 4w, 3) uint8 RGB.
        seed: of everything random.

    Returns:
        (T, h, w, 3) uint8 RGB.

    Raises:
        ExportError: no such degradation, or an encoder refused.
    """
    check_degradation(name)
    if name == "real":
        return real(truth, np.random.default_rng(seed))
    reduce = bd if name == "bd" else bi
    lr = np.concatenate([_reduced(frame, reduce) for frame in truth])  # a whole clip in floats is large
    return transcode(lr, x264(int(name.removeprefix("x264-")))) if name.startswith("x264") else lr


def _reduced(frame: Frames, reduce: Callable[[Tensor], Tensor]) -> Frames:
    """(4h, 4w, 3) -> (1, h, w, 3)."""
    hr = torch.from_numpy(np.array(frame)).permute(2, 0, 1).float()[None] / 255
    lr: Frames = (reduce(hr) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return lr


def _in_8_bits(images: Tensor) -> Tensor:
    return (images.clamp(0, 1) * 255).round() / 255
