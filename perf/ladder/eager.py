"""``python -m perf.ladder.eager``: a checkpoint in PyTorch, eager, FP32, in a process of its own."""

from __future__ import annotations

import json
import time
from pathlib import Path

import click
import numpy as np
import torch

from export.checkpoint import load_checkpoint
from perf.clip import Frames, windows
from perf.errors import Command
from perf.ladder.pace import enough

WINDOW = 3


@click.command(cls=Command)
@click.option("--checkpoint", type=click.Path(path_type=Path), required=True)
@click.option("--frames", "source", type=click.Path(path_type=Path), required=True, help=".npy of the clip.")
@click.option("--answers", type=click.Path(path_type=Path), required=True, help=".npy to write.")
@click.option("--threads", required=True, type=int)
@click.option("--seconds", required=True, type=float, help="Go on for so long, over the clip again.")
def main(checkpoint: Path, source: Path, answers: Path, threads: int, seconds: float) -> None:
    """Upscale a clip, window by window; print when each answer was done, as JSON."""
    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # FP32 means FP32
    network = load_checkpoint(checkpoint).to(device)
    clip = windows(np.load(source), WINDOW)
    done_s: list[float] = []
    found: list[Frames] = []
    started_s = time.monotonic()
    with torch.inference_mode():
        while not enough(len(done_s), time.monotonic() - started_s, 1, len(clip), seconds):
            window = torch.from_numpy(clip[len(done_s) % len(clip)])[None]
            answer = network(window.to(device))[0].cpu().numpy()
            done_s.append(time.monotonic())
            if len(found) < len(clip):
                found.append(answer)
    np.save(answers, np.stack(found))
    click.echo(json.dumps(done_s))


if __name__ == "__main__":
    main()
