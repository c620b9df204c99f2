"""Degradations: how lr windows are made from hr ones, by name.

All run on the device of their input, but for the codecs of ``real``: x264 and libjpeg exist on the CPU only,
and their own artifacts are better than a model of them; lr frames have a sixteenth of the pixels.
Nothing is differentiable, and nothing need be: lr windows are data.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import cache

import av
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from export.errors import ExportError
from export.spec import SCALE

Degradation = Callable[[Tensor, np.random.Generator], Tensor]
"""(N, T, 3, H, W) float32 hr windows, 0..1, to (N, T, 3, H/4, W/4) float32, multiples of 1/255."""

BD_SIGMA = 1.6  # hr pixels
BD_RADIUS = 6  # hr pixels: the 13x13 kernel of Jo et al. 2018

# Of ``real``. One draw per window: the frames of a video share their camera and their codec.
BLUR_SIGMAS = (0.4, 3.0)  # hr pixels, each axis of its own
BLUR_RADIUS = 9  # hr pixels, three times the largest sigma
RESIZES = ("area", "bilinear", "bicubic")
MIDWAY = (1 / SCALE, 1.0)  # size after the first of the two resizes, over the hr size
MAX_NOISE = 8.0  # standard deviation, gray levels
MAX_SHOT_NOISE = 0.6  # gray levels at a gray level of 1; 10 at white: grows with the square root
GRAY_NOISE_SHARE = 0.4  # of the windows have noise without color
H264_SHARE, JPEG_SHARE = 0.6, 0.2  # of the windows; the rest stays uncompressed
CRF = (18, 36)  # of H.264: hardly visible .. poor
JPEG_QUALITY = (40, 96)


def bi(hr: Tensor, rng: np.random.Generator | None = None) -> Tensor:
    """Bicubic with antialiasing, as MATLAB's imresize: lr pixel (0, 0) covers hr pixels (0..3, 0..3)."""
    frames = hr.flatten(0, -4)
    lr = F.interpolate(frames, scale_factor=1 / SCALE, mode="bicubic", antialias=True, align_corners=False)
    return _in_8_bits(lr).unflatten(0, hr.shape[:-3])


def bd(hr: Tensor, rng: np.random.Generator | None = None) -> Tensor:
    """Gaussian blur of sigma 1.6, then every fourth pixel, as the published BD scores have it.

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


def real(hr: Tensor, rng: np.random.Generator) -> Tensor:
    """What cameras and codecs do: random blur, two resizes, noise, then H.264 or JPEG compression.

    The same generator gives the same answer on the same device.
    """
    noise = torch.Generator(hr.device).manual_seed(int(rng.integers(2**63)))
    lr = torch.stack([_resized(_blurred(window, rng), rng) for window in hr])
    return _compressed(_in_8_bits(_noisy(lr, rng, noise)), rng)


DEGRADATIONS: dict[str, Degradation] = {"bi": bi, "bd": bd, "real": real}


def degrade(name: str, hr: Tensor, rng: np.random.Generator) -> Tensor:
    """Lr windows from hr windows.

    Args:
        name: one of ``DEGRADATIONS``.
        hr: (N, T, 3, H, W) float32, 0..1, on any device; sides multiples of 8.
        rng: source of everything random; seed it by step to repeat a step.

    Returns:
        (N, T, 3, H/4, W/4) float32, 0..1, multiples of 1/255, on the device of ``hr``.

    Raises:
        ExportError: no such degradation.
    """
    if name not in DEGRADATIONS:
        raise ExportError(f"expected a degradation among {', '.join(DEGRADATIONS)}, found {name!r}")
    return DEGRADATIONS[name](hr, rng)


def _in_8_bits(images: Tensor) -> Tensor:
    return (images.clamp(0, 1) * 255).round() / 255


def _blurred(frames: Tensor, rng: np.random.Generator) -> Tensor:
    """(T, 3, H, W) under one anisotropic Gaussian at a random angle."""
    sigmas, angle = rng.uniform(*BLUR_SIGMAS, 2), rng.uniform(0, np.pi)
    y, x = np.mgrid[-BLUR_RADIUS : BLUR_RADIUS + 1, -BLUR_RADIUS : BLUR_RADIUS + 1]
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    kernel = np.exp(-((along / sigmas[0]) ** 2 + (across / sigmas[1]) ** 2) / 2)
    weight = torch.from_numpy(kernel / kernel.sum()).to(frames)
    padded = F.pad(frames, (BLUR_RADIUS,) * 4, mode="reflect")
    return F.conv2d(padded.flatten(0, 1).unsqueeze(1), weight[None, None]).view(frames.shape)


def _resized(frames: Tensor, rng: np.random.Generator) -> Tensor:
    """(T, 3, H, W) to (T, 3, H/4, W/4) by way of a random size."""
    height, width = frames.shape[-2:]
    share = rng.uniform(*MIDWAY)
    for size in ((round(height * share), round(width * share)), (height // SCALE, width // SCALE)):
        mode = RESIZES[rng.integers(len(RESIZES))]
        frames = F.interpolate(frames, size, mode=mode, **({} if mode == "area" else {"antialias": True}))
    return frames


def _noisy(lr: Tensor, rng: np.random.Generator, noise: torch.Generator) -> Tensor:
    """(N, T, 3, h, w) with noise of the sensor, constant, and of the light, which grows with its root."""
    windows = []
    for window in lr:
        read, shot = rng.uniform(0, MAX_NOISE), rng.uniform(0, MAX_SHOT_NOISE)
        channels = 1 if rng.random() < GRAY_NOISE_SHARE else 3
        sigma = (read**2 + shot**2 * 255 * window.clamp(0, 1)).sqrt() / 255
        shape = (len(window), channels, *window.shape[-2:])
        windows.append(window + sigma * torch.randn(shape, device=lr.device, generator=noise))
    return torch.stack(windows)


def _compressed(lr: Tensor, rng: np.random.Generator) -> Tensor:
    """(N, T, 3, h, w), multiples of 1/255, after one codec per window."""
    frames = (lr * 255).to(torch.uint8).permute(0, 1, 3, 4, 2).contiguous().cpu().numpy()
    jobs: list[tuple[Callable[[Frames, int], Frames], Frames, int]] = []
    for window in frames:
        kind, crf, quality = rng.random(), int(rng.integers(*CRF)), int(rng.integers(*JPEG_QUALITY))
        if kind < H264_SHARE:
            jobs.append((_h264, window, crf))
        elif kind < H264_SHARE + JPEG_SHARE:
            jobs.append((_jpeg, window, quality))
        else:
            jobs.append((_uncompressed, window, 0))
    coded = np.stack(list(_codecs().map(lambda job: job[0](job[1], job[2]), jobs)))
    return torch.from_numpy(coded).to(lr.device).permute(0, 1, 4, 2, 3).float() / 255


Frames = NDArray[np.uint8]
"""(T, h, w, 3) RGB."""


@cache
def _codecs() -> ThreadPoolExecutor:
    # Codecs release the interpreter's lock; one thread each keeps x264's answer the same on every machine.
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="codec")


def _h264(frames: Frames, crf: int) -> Frames:
    encoder = av.CodecContext.create("libx264", "w")
    encoder.height, encoder.width = frames.shape[1:3]
    encoder.pix_fmt, encoder.time_base, encoder.framerate = "yuv420p", Fraction(1, 25), Fraction(25)
    encoder.thread_count = 1
    encoder.options = {"crf": str(crf), "preset": "veryfast", "tune": "zerolatency"}
    decoder = av.CodecContext.create("h264", "r")
    decoder.thread_count = 1
    pictures = [av.VideoFrame.from_ndarray(frame, "rgb24") for frame in frames]
    for index, picture in enumerate(pictures):
        picture.pts = index
    packets = [packet for picture in (*pictures, None) for packet in encoder.encode(picture)]
    decoded = [frame for packet in (*packets, None) for frame in decoder.decode(packet)]
    return np.stack([frame.to_ndarray(format="rgb24") for frame in decoded])


def _jpeg(frames: Frames, quality: int) -> Frames:
    coded = []
    for frame in frames:
        file = io.BytesIO()
        Image.fromarray(frame).save(file, "jpeg", quality=quality)
        coded.append(np.asarray(Image.open(file)))
    return np.stack(coded)


def _uncompressed(frames: Frames, _: int) -> Frames:
    return frames
