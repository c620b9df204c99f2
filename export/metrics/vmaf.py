"""VMAF by its reference implementation: libvmaf, in the FFmpeg that the ``imageio-ffmpeg`` wheel carries."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from export.errors import ExportError

log = logging.getLogger(__name__)

MODEL = "vmaf_v0.6.1"  # for a 1080p screen three heights away; smaller frames are scored as if they filled it
PACKAGE = "imageio_ffmpeg"


def has_vmaf() -> bool:
    """Whether the wheel that carries libvmaf is installed."""
    return importlib.util.find_spec(PACKAGE) is not None


def vmaf(frames: Sequence[NDArray[np.uint8]], truth: Sequence[NDArray[np.uint8]]) -> float:
    """Mean VMAF, 0..100, of consecutive (H, W, 3) uint8 RGB frames; the first counts as one without motion.

    Raises:
        ExportError: FFmpeg failed.
    """
    import imageio_ffmpeg

    height, width = truth[0].shape[:2]
    # Both become 4:2:0, as VMAF was trained on; it looks at luma alone.
    graph = (
        "[0:v]format=yuv420p[image];[1:v]format=yuv420p[truth];"
        f"[image][truth]libvmaf=model=version={MODEL}:log_fmt=json:log_path=vmaf.json:"
        f"n_threads={os.cpu_count()}"
    )
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-video_size", f"{width}x{height}", "-framerate", "25"]
    with TemporaryDirectory(prefix="vmaf-") as folder:
        for name, images in (("image.rgb", frames), ("truth.rgb", truth)):
            Path(folder, name).write_bytes(np.ascontiguousarray(images).tobytes())
        command = [
            imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-nostdin", "-loglevel", "error",
            *raw, "-i", "image.rgb", *raw, "-i", "truth.rgb", "-filter_complex", graph, "-f", "null", "-",
        ]  # fmt: skip
        log.debug("in %s: %s", folder, shlex.join(command))
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise ExportError(
                f"expected a VMAF score, found FFmpeg's exit status {done.returncode}: "
                f"{done.stderr.strip()[-500:]}; pass --no-vmaf to leave it out\n  {shlex.join(command)}"
            )
        report = json.loads(Path(folder, "vmaf.json").read_text())
    return float(report["pooled_metrics"]["vmaf"]["mean"])
