"""Footage that several files of training's tests decode: written once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from made_up_footage import write_video


@pytest.fixture(scope="session")
def moving() -> np.ndarray:
    """20 frames, 320x480, of a smooth picture that moves by (2, 3) pixels per frame."""
    rng = np.random.default_rng(0)
    noise = torch.from_numpy(rng.random((1, 3, 16, 24), dtype=np.float32))
    picture = (F.interpolate(noise, scale_factor=24, mode="bicubic")[0].clamp(0, 1) * 255).byte().numpy()
    return np.stack([picture[:, 2 * t : 2 * t + 320, 3 * t : 3 * t + 480] for t in range(20)]).transpose(
        0, 2, 3, 1
    )


@pytest.fixture(scope="session")
def footage(tmp_path_factory: pytest.TempPathFactory, moving: np.ndarray) -> Path:
    folder = tmp_path_factory.mktemp("footage")
    for name in ("a.mp4", "b.mp4", "held_back.mp4"):
        write_video(folder / name, np.ascontiguousarray(moving))
    return folder
