"""Training windows: batches that repeat, crops of several windows, the sharpest of a few crops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from made_up_footage import noise_clip

from export.data.clips import Clip, load_folder
from export.data.windows import WindowSampler, move_camera, windowed


def test_batches_repeat_and_differ(footage: Path, tmp_path: Path) -> None:
    clips = load_folder(footage, tmp_path, min_side=64)
    photo = Clip("photo", np.random.default_rng(0).integers(0, 255, (1, 1, 160, 160, 3), dtype=np.uint8))

    def sampler(seed: int) -> WindowSampler:
        return WindowSampler(clips, [photo], patch=64, photo_share=0.5, seed=seed)

    batch = sampler(1).batch(7, 6)
    assert batch.shape == (6, 3, 3, 64, 64)
    assert batch.min() >= 0
    assert batch.max() <= 1
    assert torch.equal(batch, sampler(1).batch(7, 6))
    assert not torch.equal(batch, sampler(1).batch(8, 6))
    assert not torch.equal(batch, sampler(2).batch(7, 6))


def test_a_camera_moves_over_a_photo_as_told() -> None:
    """By whole pixels of the photo: each frame is a crop of it, shifted."""
    side, patch = 96, 64
    photo = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    cameras = torch.zeros(1, 3, 3, 3)
    for frame, (dx, dy) in enumerate([(-3, 5), (0, 0), (7, -2)]):
        cameras[0, frame] = torch.tensor(
            [[patch / side, 0, 2 * dx / side], [0, patch / side, 2 * dy / side], [0, 0, 1]]
        )
    views = move_camera(photo, cameras, patch)
    for view, (dx, dy) in zip(views[0], [(-3, 5), (0, 0), (7, -2)], strict=True):
        expected = photo[0, :, 16 + dy : 16 + dy + patch, 16 + dx : 16 + dx + patch]
        torch.testing.assert_close(view, expected, atol=1e-4, rtol=0)


def test_long_crops_are_windows_in_a_row(footage: Path, tmp_path: Path) -> None:
    clips = load_folder(footage, tmp_path, min_side=64)
    photo = Clip("photo", np.random.default_rng(0).integers(0, 255, (1, 1, 192, 192, 3), dtype=np.uint8))
    batch = WindowSampler(clips, [photo], patch=64, photo_share=0.5, seed=1).batch(7, 6, length=5)
    assert batch.shape == (6, 5, 3, 64, 64)
    windows = windowed(batch)
    assert windows.shape == (18, 3, 3, 64, 64)
    assert torch.equal(windows[4], batch[1, 1:4])


def test_of_a_few_crops_the_sharpest_is_taken() -> None:
    """More than half of the picture is flat; of four tries one nearly always finds the rest."""
    segments = noise_clip("half", 7, 128).segments.copy()
    segments[:, :, :, :72] = 90
    sampler = WindowSampler([Clip("half", segments)], [], patch=32, photo_share=0, seed=0)
    deviations = sampler.batch(0, 64)[:, 1].std((1, 2, 3)) * 255
    assert (deviations > 6).float().mean() > 0.9  # about two thirds without
