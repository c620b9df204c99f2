"""Footage as people have it: lr sequences after a lens, a sensor, a camera's processing and codecs.

One draw for a whole sequence, for its frames share lens, sensor and codec: blur (isotropic, anisotropic, of
motion), reduction by one of several kernels, noise in linear light, sharpening with its halos, 8 bits, then
one or two generations of a codec. Shares and ranges are the constants below; the order is that of Real-ESRGAN
and RealBasicVSR (Wang et al. 2021, Chan et al. 2022), with real codecs over the whole sequence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from export.data.codecs import Coding, Frames, transcode
from export.spec import SCALE

PLAIN_SHARE = 0.4  # of the sequences are reduced by plain bicubic: all that is wrong with them is the codec
BLUR_SHARE = 0.6  # of the others have a lens that blurs
BLUR_SIGMAS = (0.3, 2.6)  # hr pixels
ISOTROPIC_SHARE = 0.5
MOTION_SHARE = 0.25  # of the others: the camera moves while the shutter is open
MOTION_LENGTH = (2.0, 14.0)  # hr pixels, at most
NOISE_SHARE = 0.6
READ_NOISE = 0.004  # standard deviation at most, in linear light, white = 1
SHOT_NOISE = 0.0015  # variance at most, of white; in proportion to the light
GRAY_NOISE_SHARE = 0.4
GAMMA = 2.2
SHARPEN_SHARE = 0.4
SHARPEN_AMOUNT = (0.2, 1.2)
SHARPEN_SIGMAS = (0.6, 1.4)  # lr pixels
UNCODED_SHARE = 0.1
SECOND_SHARE = 0.3  # of the coded ones were coded before: as platforms do with what is sent to them

X265_ALONE = "log-level=error:pools=none:frame-threads=1"  # in one thread

KERNELS = {"bicubic": 2.0, "bilinear": 1.0, "area": 0.5, "lanczos": 3.0}
"""Reduction kernels, and half their width in lr pixels."""
BLUR_RADIUS = 8  # hr pixels: three times the largest sigma, half of the longest motion


@dataclass(frozen=True)
class Camera:
    """What happens to a sequence before it is coded."""

    kernel: str
    """One of ``KERNELS``."""
    sigmas: tuple[float, float]
    """Of the lens's Gaussian along its two axes, hr pixels; 0: none."""
    angle: float
    """Of its first axis, radians."""
    motion: float
    """Longest path of the camera while the shutter is open, hr pixels."""
    direction: float
    """Of that path, radians."""
    read_noise: float
    shot_noise: float
    gray_noise: bool
    sharpen: float
    """Share of the detail that is added again."""
    sharpen_sigma: float


PLAIN = Camera("bicubic", (0.0, 0.0), 0.0, 0.0, 0.0, 0.0, 0.0, False, 0.0, 1.0)


def draw_camera(rng: np.random.Generator) -> Camera:
    """A camera; with ``PLAIN_SHARE`` none at all."""
    if rng.random() < PLAIN_SHARE:
        return PLAIN
    first, second = rng.uniform(*BLUR_SIGMAS, 2) if rng.random() < BLUR_SHARE else (0.0, 0.0)
    is_noisy = rng.random() < NOISE_SHARE
    return Camera(
        kernel=str(rng.choice(list(KERNELS))),
        sigmas=(first, first if rng.random() < ISOTROPIC_SHARE else second),
        angle=rng.uniform(0, math.pi),
        motion=rng.uniform(*MOTION_LENGTH) if rng.random() < MOTION_SHARE else 0.0,
        direction=rng.uniform(0, math.pi),
        read_noise=READ_NOISE * rng.random() ** 2 if is_noisy else 0.0,
        shot_noise=SHOT_NOISE * rng.random() ** 2 if is_noisy else 0.0,
        gray_noise=bool(rng.random() < GRAY_NOISE_SHARE),
        sharpen=rng.uniform(*SHARPEN_AMOUNT) if rng.random() < SHARPEN_SHARE else 0.0,
        sharpen_sigma=rng.uniform(*SHARPEN_SIGMAS),
    )


def draw_codings(rng: np.random.Generator) -> list[Coding]:
    """None, one or two generations; the first of two is the better one."""
    if rng.random() < UNCODED_SHARE:
        return []
    codings = [_coding(rng, rng.random())]
    if rng.random() < SECOND_SHARE:
        codings.insert(0, _coding(rng, 0.5 * rng.random()))
    return codings


def _coding(rng: np.random.Generator, loss: float) -> Coding:
    """An encoder at a ``loss`` between 0, hardly visible, and 1, poor."""
    gop = int(rng.choice((12, 25, 48, 120, 250)))

    def between(least: int, most: int) -> str:
        return str(round(least + loss * (most - least)))

    encoder = rng.choice(
        ("libx264", "libx265", "mpeg4", "libvpx-vp9", "libsvtav1", "mpeg2video", "mjpeg"),
        p=(0.5, 0.15, 0.1, 0.1, 0.07, 0.04, 0.04),
    )
    match encoder:
        case "libx264":
            preset = str(rng.choice(("veryfast", "fast", "medium")))
            return Coding("libx264", {"preset": preset, "crf": between(18, 38)}, gop)
        case "libx265":
            one_thread = "log-level=error:pools=none:frame-threads=1"
            return Coding(
                "libx265", {"preset": "fast", "crf": between(20, 40), "x265-params": one_thread}, gop
            )
        case "libvpx-vp9":
            return Coding("libvpx-vp9", {"crf": between(20, 52), "b": "0", "cpu-used": "5"}, gop)
        case "libsvtav1":
            return Coding("libsvtav1", {"crf": between(24, 56), "preset": "10", "svtav1-params": "lp=1"}, gop)
        case _:
            step, full_range = between(2, 14), encoder == "mjpeg"
            options = {"qmin": step, "qmax": step}
            return Coding(str(encoder), options, gop, "yuvj420p" if full_range else "yuv420p")


def real(truth: Frames, rng: np.random.Generator) -> Frames:
    """A sequence as a camera and codecs would have given it.

    Args:
        truth: (T, 4h, 4w, 3) uint8 RGB, consecutive frames of one scene.
        rng: source of everything random.

    Returns:
        (T, h, w, 3) uint8 RGB; lr pixel (0, 0) covers hr pixels (0..3, 0..3), as in ``bi``.

    Raises:
        ExportError: an encoder refused.
    """
    camera, codings = draw_camera(rng), draw_codings(rng)
    lr = film(truth, camera, rng)
    for coding in codings:
        lr = transcode(lr, coding)
    return lr


def film(truth: Frames, camera: Camera, rng: np.random.Generator) -> Frames:
    """(T, 4h, 4w, 3) uint8 -> (T, h, w, 3) uint8, before any codec."""
    noise = torch.Generator().manual_seed(int(rng.integers(2**63)))
    pace, phase = rng.uniform(0.02, 0.3), rng.uniform(0, 2 * math.pi)  # of the camera's motion
    lr = []
    for t, frame in enumerate(truth):
        image = torch.from_numpy(np.array(frame)).permute(2, 0, 1).float()[:, None] / 255
        path = camera.motion * abs(math.sin(pace * t + phase))
        small = _sharpened(_noisy(_reduced(image, _kernel(camera, path)), camera, noise), camera)
        lr.append((small.clamp(0, 1) * 255).round().to(torch.uint8)[:, 0].permute(1, 2, 0).numpy())
    return np.stack(lr)


def _kernel(camera: Camera, path: float) -> Tensor:
    """(K, K) float32, K even: lens, motion and reduction in one, around the middle of 4x4 hr pixels."""
    half = round(KERNELS[camera.kernel] * SCALE)
    x = (torch.arange(-half, half, dtype=torch.float64) + 0.5) / SCALE
    row = _profile(camera.kernel, x)
    kernel = (row[:, None] * row)[None, None]
    for blur in (_lens(camera), _motion(path, camera.direction)):
        if blur is not None:
            kernel = F.conv2d(kernel, blur[None, None], padding=len(blur) - 1)  # symmetric: flipped or not
    return (kernel / kernel.sum())[0, 0].float()


def _profile(kernel: str, x: Tensor) -> Tensor:
    """Values of a reduction kernel at distances ``x``, in lr pixels."""
    x = x.abs()
    if kernel == "lanczos":
        return torch.sinc(x) * torch.sinc(x / 3)
    if kernel == "bilinear":
        return 1 - x
    if kernel == "area":
        return torch.ones_like(x)
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2  # Keys 1981, a = -1/2
    return torch.where(x <= 1, near, far)


def _positions() -> tuple[Tensor, Tensor]:
    axis = torch.arange(-BLUR_RADIUS, BLUR_RADIUS + 1, dtype=torch.float64)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return y, x


def _lens(camera: Camera) -> Tensor | None:
    if not max(camera.sigmas):
        return None
    y, x = _positions()
    cos, sin = math.cos(camera.angle), math.sin(camera.angle)
    u, v = (x * cos + y * sin) / camera.sigmas[0], (y * cos - x * sin) / camera.sigmas[1]
    return torch.exp(-(u * u + v * v) / 2)


def _motion(path: float, direction: float) -> Tensor | None:
    """A straight line of length ``path``, one pixel wide, with soft edges."""
    if path < 1:
        return None
    y, x = _positions()
    cos, sin = math.cos(direction), math.sin(direction)
    along, across = (x * cos + y * sin).abs(), (y * cos - x * sin).abs()
    return (path / 2 + 0.5 - along).clamp(0, 1) * (1 - across).clamp(min=0)


def _reduced(image: Tensor, kernel: Tensor) -> Tensor:
    """(3, 1, 4h, 4w) -> (3, 1, h, w)."""
    pad = len(kernel) // 2 - SCALE // 2
    padded = F.pad(image, (pad, pad, pad, pad), "replicate")
    return F.conv2d(padded, kernel[None, None], stride=SCALE)


def _noisy(lr: Tensor, camera: Camera, noise: torch.Generator) -> Tensor:
    if not (camera.read_noise or camera.shot_noise):
        return lr
    light = lr.clamp(0, 1) ** GAMMA
    sigma = (camera.read_noise**2 + camera.shot_noise * light).sqrt()
    shape = (1 if camera.gray_noise else len(lr), *lr.shape[1:])
    return (light + sigma * torch.randn(shape, generator=noise)).clamp(0, 1) ** (1 / GAMMA)


def _sharpened(lr: Tensor, camera: Camera) -> Tensor:
    """Unsharp masking: the detail below ``sharpen_sigma`` is added again, and overshoots at edges."""
    if not camera.sharpen:
        return lr
    radius = math.ceil(2 * camera.sharpen_sigma)
    row = torch.exp(-((torch.arange(-radius, radius + 1) / camera.sharpen_sigma) ** 2) / 2)
    row = row / row.sum()
    padded = F.pad(lr, (radius,) * 4, "replicate")
    soft = F.conv2d(F.conv2d(padded, row.view(1, 1, -1, 1)), row.view(1, 1, 1, -1))
    return lr + camera.sharpen * (lr - soft)
