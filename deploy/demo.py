"""``make demo``: downscale a real clip by 4, upscale it through a real server, compare it with bicubic."""

from __future__ import annotations

import logging
import shlex
import subprocess
import sys
from collections.abc import Sequence
from fractions import Fraction
from itertools import islice
from pathlib import Path

import av
import numpy as np
import torch

from deploy.embedded.server import TritonServer
from export.data.clips import SCALER
from export.data.degradations import degrade
from export.data.sample import sample_clip
from export.metrics.bicubic import bicubic
from export.metrics.collage import Frame, draw_collage, lossiest_crop
from export.metrics.psnr_ssim import psnr_y, ssim_y
from export.spec import MULTIPLE_OF, SCALE

ROOT = Path(__file__).parent.parent
OUT = ROOT / "build" / "demo"
FIRST, FRAMES = 110, 75  # three seconds: a cyclist waits, then a street
log = logging.getLogger("demo")


def main() -> None:
    """Make the clip, serve, upscale it, score the result and draw a comparison."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    OUT.mkdir(parents=True, exist_ok=True)
    lr_path, hr_path, picture = OUT / "input.mkv", OUT / "upscaled.mp4", OUT / "comparison.png"

    truth, rate = read_frames(sample_clip(), FIRST, FRAMES)
    multiple = SCALE * MULTIPLE_OF
    height, width = (side // multiple * multiple for side in truth[0].shape[:2])
    truth = [frame[:height, :width] for frame in truth]
    lr = [reduce(frame) for frame in truth]
    write_lossless(lr_path, lr, rate)

    with TritonServer(ROOT / "model_repository", OUT / "triton.log") as server:
        run(["client/upscale.py", lr_path, hr_path, "--url", server.grpc_url, "--crf", "12", "--overwrite"])

    ours, _ = read_frames(hr_path, 0, FRAMES)
    enlarged = [bicubic_frame(frame) for frame in lr]
    table = {"bicubic": scores(enlarged, truth), "MST-GAN": scores(ours, truth)}
    # The frame and crop where bicubic is worst: the choice does not depend on our output.
    index = int(np.argmin([psnr_y(a, b) for a, b in zip(enlarged, truth, strict=True)]))
    corner = lossiest_crop(enlarged[index], truth[index])
    draw_collage(picture, corner, {"bicubic": enlarged[index], "MST-GAN": ours[index], "truth": truth[index]})
    for name, (psnr, ssim) in table.items():
        log.info("%-8s PSNR-Y %.2f dB  SSIM-Y %.4f", name, psnr, ssim)
    for path in (lr_path, hr_path, picture):
        log.info("%s", path.relative_to(ROOT))


def run(arguments: Sequence[str | Path]) -> None:
    """Run one of the project's scripts as a user would; its exit status becomes ours."""
    command = [sys.executable, *map(str, arguments)]
    log.info("%s", shlex.join(command))
    status = subprocess.run(command, cwd=ROOT).returncode
    if status:
        sys.exit(status)


def read_frames(path: Path, first: int, count: int) -> tuple[list[Frame], Fraction]:
    """Consecutive frames of a video, (H, W, 3) uint8 RGB, and its rate."""
    with av.open(str(path)) as container:
        rate = container.streams.video[0].average_rate
        assert rate is not None
        frames = islice(container.decode(video=0), first, first + count)
        rgb = [frame.to_ndarray(format="rgb24", interpolation=SCALER) for frame in frames]
        return [frame.astype(np.uint8, copy=False) for frame in rgb], rate


def write_lossless(path: Path, frames: Sequence[Frame], rate: Fraction) -> None:
    """Write RGB frames losslessly (FFV1)."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=rate)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "bgr0"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode())


def reduce(frame: Frame) -> Frame:
    """Downscale by 4 as in training: (4H, 4W, 3) -> (H, W, 3) uint8 RGB."""
    reduced: Frame = degrade("bi", frame[None])[0]
    return reduced


def bicubic_frame(frame: Frame) -> Frame:
    """Upscale by 4: (H, W, 3) -> (4H, 4W, 3) uint8 RGB."""
    return bicubic(torch.from_numpy(frame).expand(1, 3, -1, -1, -1))[0].numpy()


def scores(frames: Sequence[Frame], truth: Sequence[Frame]) -> tuple[float, float]:
    """Mean PSNR-Y in dB and SSIM-Y."""
    rows = [(psnr_y(a, b), ssim_y(a, b)) for a, b in zip(frames, truth, strict=True)]
    psnr, ssim = np.mean(rows, axis=0)
    return float(psnr), float(ssim)


if __name__ == "__main__":
    main()
