"""Degradations: bicubic as MATLAB's, blur and decimation as published, compression that repeats."""

from __future__ import annotations

from itertools import islice

import av
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch import Tensor

from export.data.degradations import DEGRADATIONS, bi, degrade
from export.data.sample import sample_clip
from export.errors import ExportError
from export.metrics.psnr_ssim import psnr_y


@pytest.fixture(scope="module")
def hr() -> Tensor:
    """(2, 3, 3, 192, 256) of real footage: two windows."""
    with av.open(str(sample_clip())) as container:
        frames = [f.to_ndarray(format="rgb24") for f in islice(container.decode(video=0), 3)]
    images = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).float() / 255
    return torch.stack([images[..., 40:232, 100:356], images[..., 64:256, 300:556]])


def matlab_imresize(image: np.ndarray, scale: float) -> np.ndarray:
    """MATLAB's imresize with its defaults, from its documentation, one output pixel at a time.

    Cubic of Keys 1981 with a = -0.5, stretched by 1/scale when shrinking; symmetric beyond the edges.
    """

    def cubic(x: np.ndarray) -> np.ndarray:
        x = np.abs(x)
        near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
        return np.where(x <= 1, near, np.where(x <= 2, far, 0))

    for axis in (0, 1):
        length = image.shape[axis]
        rows = []
        for out in range(1, round(length * scale) + 1):
            centre = out / scale + 0.5 * (1 - 1 / scale)  # MATLAB counts from 1
            left = int(np.floor(centre - 2 / scale))
            taps = np.arange(left, left + int(np.ceil(4 / scale)) + 2)
            weights = cubic(scale * (centre - taps))
            mirrored = (taps - 1) % (2 * length)
            mirrored = np.where(mirrored < length, mirrored, 2 * length - 1 - mirrored)
            rows.append(np.tensordot(weights / weights.sum(), np.take(image, mirrored, axis), (0, axis)))
        image = np.stack(rows, axis)
    return image


def as_frames(images: Tensor) -> np.ndarray:
    return (images * 255).round().byte().movedim(-3, -1).numpy()


def test_bi_equals_pillow() -> None:
    picture = np.random.default_rng(0).random((64, 96), dtype=np.float32)
    expected = Image.fromarray(picture, mode="F").resize((24, 16), Image.Resampling.BICUBIC)
    ours = bi(torch.from_numpy(picture).expand(1, 3, -1, -1))[0, 0].numpy()
    np.testing.assert_allclose(ours, np.clip(np.asarray(expected), 0, 1), atol=0.5 / 255 + 1e-5)


def test_bi_equals_matlab(hr: Tensor) -> None:
    truth = hr[0, 0].permute(1, 2, 0).double().numpy()
    expected = (matlab_imresize(truth, 1 / 4).clip(0, 1) * 255).round() / 255
    ours = degrade("bi", hr, np.random.default_rng(0))[0, 0].permute(1, 2, 0).numpy()
    # The edges are mirrored there and renormalised here; nothing else differs but rounding's ties.
    inner = (slice(2, -2), slice(2, -2))
    assert np.abs(ours[inner] - expected[inner]).max() <= 1 / 255 + 1e-6
    assert (np.abs(ours[inner] - expected[inner]) > 1e-6).mean() < 0.01

    def enlarged_db(lr: np.ndarray) -> float:
        frame = (matlab_imresize(lr.astype(float), 4).clip(0, 1) * 255).round().astype(np.uint8)
        return psnr_y(frame, as_frames(hr[0, 0]))

    assert abs(enlarged_db(ours) - enlarged_db(expected)) < 0.05


def test_bd_equals_blurring_and_decimating(hr: Tensor) -> None:
    ours = degrade("bd", hr, np.random.default_rng(0))
    blurred = gaussian_filter(hr[1, 2, 0].double().numpy(), 1.6, mode="mirror", radius=6)
    np.testing.assert_allclose(ours[1, 2, 0].numpy(), blurred[::4, ::4], atol=0.5 / 255 + 1e-5)


@pytest.mark.parametrize("name", DEGRADATIONS)
def test_every_degradation_keeps_to_its_contract(name: str, hr: Tensor) -> None:
    before = hr.clone()
    lr = degrade(name, hr, np.random.default_rng(7))
    assert lr.shape == (2, 3, 3, 48, 64)
    assert lr.dtype == torch.float32
    assert lr.min() >= 0 and lr.max() <= 1
    torch.testing.assert_close(lr * 255, (lr * 255).round(), atol=1e-4, rtol=0)
    assert torch.equal(hr, before)
    assert torch.equal(lr, degrade(name, hr, np.random.default_rng(7)))
    assert psnr_y(as_frames(lr[0, 1]), as_frames(degrade("bi", hr, np.random.default_rng(0))[0, 1])) > 15


def test_real_differs_by_seed_and_by_window(hr: Tensor) -> None:
    same = hr[:1].expand(2, -1, -1, -1, -1)
    lr = degrade("real", same, np.random.default_rng(1))
    assert not torch.equal(lr, degrade("real", same, np.random.default_rng(2)))
    assert not torch.equal(lr[0], lr[1])


@pytest.mark.parametrize(("h264", "jpeg"), [(1.0, 0.0), (0.0, 1.0)])
def test_codecs_keep_the_order_of_frames_and_lose_detail(
    h264: float, jpeg: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("export.data.degradations.H264_SHARE", h264)
    monkeypatch.setattr("export.data.degradations.JPEG_SHARE", jpeg)
    monkeypatch.setattr("export.data.degradations.MAX_NOISE", 0.0)
    monkeypatch.setattr("export.data.degradations.MAX_SHOT_NOISE", 0.0)
    levels = torch.tensor([0.2, 0.5, 0.8]).view(1, 3, 1, 1, 1)
    texture = 0.1 * torch.rand(1, 3, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    flat = degrade("real", levels.expand(1, 3, 3, 128, 128), np.random.default_rng(5))
    torch.testing.assert_close(flat.mean((2, 3, 4)), levels.flatten(1), atol=0.02, rtol=0)
    busy = degrade("real", levels + texture, np.random.default_rng(5))
    monkeypatch.setattr("export.data.degradations.H264_SHARE", 0.0)
    monkeypatch.setattr("export.data.degradations.JPEG_SHARE", 0.0)
    uncompressed = degrade("real", levels + texture, np.random.default_rng(5))
    assert not torch.equal(busy, uncompressed)
    assert (busy - uncompressed).abs().mean() < 0.05


def test_unknown_degradation(hr: Tensor) -> None:
    with pytest.raises(ExportError, match="expected a degradation among bi, bd, real, found 'bx'"):
        degrade("bx", hr, np.random.default_rng(0))
