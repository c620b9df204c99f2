"""Videos, image sequences and clips of noise for tests."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from export.data.clips import SEGMENT, Clip


def write_video(path: Path, frames: np.ndarray) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "10"})
        stream.height, stream.width = frames.shape[1:3]
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode())
    return path


def write_sequence(folder: Path, frames: np.ndarray, suffix: str = "png") -> Path:
    folder.mkdir(parents=True)
    for index, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / f"frame{index}.{suffix}")
    return folder


def noise_clip(name: str, frames: int, side: int) -> Clip:
    rng = np.random.default_rng(len(name))
    return Clip(name, rng.integers(0, 255, (3, frames, side, side + 16, 3), dtype=np.uint8))


def moving_clip(grid: tuple[int, int], scale: int) -> Clip:
    """One segment, 96x112, of a smooth picture that moves by (2, 3) pixels a frame."""
    noise = torch.rand(1, 3, *grid, generator=torch.Generator().manual_seed(0))
    picture = (F.interpolate(noise, scale_factor=scale, mode="bicubic")[0].clamp(0, 1) * 255).byte().numpy()
    frames = [picture[:, 2 * t : 2 * t + 96, 3 * t : 3 * t + 112] for t in range(SEGMENT)]
    return Clip("moving", np.stack(frames).transpose(0, 2, 3, 1)[None])
