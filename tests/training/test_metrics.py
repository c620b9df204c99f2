"""Every metric against a second implementation; faults are named."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from made_up_lpips import write_weights
from skimage import color, metrics

from export.data.sample import sample_clip
from export.errors import ExportError
from export.metrics import vmaf as vmaf_module
from export.metrics.bootstrap import mean_interval
from export.metrics.lpips import HEADS_FILE, load_lpips
from export.metrics.psnr_ssim import luma_bt601, psnr, psnr_y, ssim, ssim_y
from export.metrics.tof import flows, tof
from export.metrics.vmaf import vmaf


@pytest.fixture(scope="module")
def frames() -> list[np.ndarray]:
    with av.open(str(sample_clip())) as container:
        return [f.to_ndarray(format="rgb24") for f in islice(container.decode(video=0), 3)]


def blurred(frame: np.ndarray) -> np.ndarray:
    images = torch.from_numpy(frame).permute(2, 0, 1).float()[None]
    small = F.interpolate(images, scale_factor=1 / 4, mode="bicubic", antialias=True)
    large = F.interpolate(small, size=frame.shape[:2], mode="bicubic")
    return large[0].clamp(0, 255).round().byte().permute(1, 2, 0).numpy()


def test_psnr_agrees_with_scikit_image() -> None:
    with av.open(str(sample_clip())) as container:
        frame = next(container.decode(video=0)).to_ndarray(format="rgb24")
    noise = np.random.default_rng(0).normal(0, 8, frame.shape)
    noisy = np.clip(frame + noise, 0, 255).round().astype(np.uint8)
    np.testing.assert_allclose(luma_bt601(frame), color.rgb2ycbcr(frame)[..., 0], atol=1e-2)
    inner = (slice(4, -4), slice(4, -4))
    ys = [color.rgb2ycbcr(image)[..., 0][inner] for image in (noisy, frame)]
    assert psnr_y(noisy, frame) == pytest.approx(
        metrics.peak_signal_noise_ratio(*ys, data_range=255), abs=1e-3
    )
    assert psnr_y(frame, frame) == float("inf")
    assert ssim_y(frame, frame) == 1
    assert 0.3 < ssim_y(noisy, frame) < 0.99


def test_border_and_channels_are_options(frames: list[np.ndarray]) -> None:
    truth = frames[0]
    image = truth.copy()
    image[:8] = 255 - image[:8]
    image[..., 0] ^= 1
    assert psnr(image, truth, border=8) > psnr(image, truth, border=4) > psnr(image, truth, border=0)
    expected = metrics.peak_signal_noise_ratio(truth, image, data_range=255)
    assert psnr(image, truth, channels="rgb", border=0) == pytest.approx(expected, abs=1e-6)
    of_channels = [
        ssim(c, t, channels="rgb", border=0)
        for c, t in (
            (np.repeat(image[..., k : k + 1], 3, 2), np.repeat(truth[..., k : k + 1], 3, 2)) for k in range(3)
        )
    ]
    assert ssim(image, truth, channels="rgb", border=0) == pytest.approx(np.mean(of_channels), abs=1e-9)


def test_ssim_is_wangs(frames: list[np.ndarray]) -> None:
    """Wang et al. 2004: an 11x11 Gaussian window of sigma 1.5, where it fits, K1 = 0.01, K2 = 0.03."""
    frame = frames[0][40:136, 100:228]
    image, truth = (
        torch.from_numpy(luma_bt601(frame))[None, None, 4:-4, 4:-4] for frame in (blurred(frame), frame)
    )
    x = torch.arange(-5, 6, dtype=torch.float64)
    line = torch.exp(-(x**2) / (2 * 1.5**2))
    window = torch.outer(line, line)[None, None] / line.sum() ** 2

    def local(values: torch.Tensor) -> torch.Tensor:
        return F.conv2d(values, window)

    m1, m2 = local(image), local(truth)
    v1, v2 = local(image**2) - m1**2, local(truth**2) - m2**2
    covariance = local(image * truth) - m1 * m2
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    expected = ((2 * m1 * m2 + c1) * (2 * covariance + c2)) / ((m1**2 + m2**2 + c1) * (v1 + v2 + c2))
    assert ssim_y(blurred(frame), frame) == pytest.approx(expected.mean().item(), abs=1e-6)


def test_lpips_equals_its_authors_package(tmp_path: Path) -> None:
    """0.29077396 is what lpips 0.1.4 (torchvision 0.29) answers with these weights and images."""
    write_weights(tmp_path)
    lpips = load_lpips(tmp_path)
    y, x = torch.meshgrid(torch.arange(48.0), torch.arange(64.0), indexing="ij")
    image = torch.stack([(x * y / 50 + k).sin() * 0.5 + 0.5 for k in range(3)])[None]
    other = image.roll(2, -1) ** 2
    assert lpips(image, other).item() == pytest.approx(0.29077396, abs=1e-5)
    assert lpips(image, image).item() == 0
    byte_frames = [(i[0].permute(1, 2, 0) * 255).round().byte().numpy() for i in (image, other)]
    assert lpips.of_frames(*byte_frames) == pytest.approx(0.2908, abs=2e-3)


def test_lpips_names_what_is_wrong_with_its_weights(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"expected weights of LPIPS .* at .*, found no file"):
        load_lpips(tmp_path)
    write_weights(tmp_path)
    heads = torch.load(tmp_path / HEADS_FILE, weights_only=True)
    torch.save({**heads, "lin2.model.1.weight": torch.zeros(1, 3, 1, 1)}, tmp_path / HEADS_FILE)
    with pytest.raises(ExportError, match=r"found other keys or shapes: .*\[1, 256, 1, 1\]"):
        load_lpips(tmp_path)
    (tmp_path / HEADS_FILE).write_text("not weights")
    with pytest.raises(ExportError, match="to be a PyTorch state dict, found something else"):
        load_lpips(tmp_path)


def test_tof_is_the_length_of_the_missing_motion() -> None:
    noise = torch.rand(1, 3, 20, 24, generator=torch.Generator().manual_seed(0))
    picture = F.interpolate(noise, scale_factor=8, mode="bicubic")[0].clamp(0, 1)
    still = (picture * 255).byte().permute(1, 2, 0).numpy()
    moving = [np.roll(still, (t, t), (0, 1))[8:-8, 8:-8] for t in range(3)]
    true_flows = flows(moving)
    assert tof(moving, true_flows) == 0
    # By a pixel down and a pixel to the right: sqrt(2), not 1 as if the axes were averaged.
    assert tof([moving[0]] * 3, true_flows) == pytest.approx(2**0.5, abs=0.15)


def test_vmaf_falls_with_blur(frames: list[np.ndarray]) -> None:
    same, blur = vmaf(frames, frames), vmaf([blurred(f) for f in frames], frames)
    assert same > 95
    # vmaf-torch 1.1.0, written from the same paper, is within 0.1 of libvmaf on such frames.
    assert 50 < blur < 90


def test_vmaf_tells_why_it_failed(frames: list[np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vmaf_module, "MODEL", "no_such_model")
    with pytest.raises(ExportError, match=r"exit status \d+: (.|\n)*--no-vmaf"):
        vmaf(frames, frames)


def test_interval_is_of_the_mean_and_paired() -> None:
    assert mean_interval([0.5]) is None
    assert mean_interval([0.5, 0.5, 0.5]) == pytest.approx((0.5, 0.5))
    values = np.random.default_rng(0).normal(1.0, 2.0, 400)
    low, high = mean_interval(values.tolist()) or (0, 0)
    half = 1.96 * values.std() / 20  # the normal approximation, good for so many
    assert low == pytest.approx(values.mean() - half, abs=0.03)
    assert high == pytest.approx(values.mean() + half, abs=0.03)
    assert mean_interval(values.tolist()) == (low, high)  # the same every time
