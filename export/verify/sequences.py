"""Compare a recurrent network's stages over a sequence, with the state as it is served."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
import torch

from export import spec
from export.data.sample import Frames, reduced_windows
from export.metrics.psnr_ssim import psnr_y
from export.model_config import FP32
from export.network.stream import StreamNetwork
from export.onnx.stream import StreamRunner
from export.verify.compare import Comparison, psnr_db, tolerances

FIRST = 70  # of the sample clip, after what calibration saw
PARITY_FRAMES = 12
FRAMES = 100


def compare_sequence(network: StreamNetwork, stages: Mapping[str, Path]) -> Comparison:
    """FP32 stages against PyTorch, each with its own state, over two sequences.

    Args:
        network: the reference.
        stages: ONNX file of every stage.
    """
    lr, _ = _sequence(PARITY_FRAMES)
    runner = StreamRunner(stages)
    expected, found = [], []
    for part in np.split(lr, 2):
        runner.reset()
        expected += [answer.numpy() for answer in network.upscale(map(torch.from_numpy, part))]
        found += [runner.upscale(frame) for frame in part]
    worst = max(int(np.abs(a.astype(int) - b).max()) for a, b in zip(found, expected, strict=True))
    measured = {"psnr_db": psnr_db(np.stack(found), np.stack(expected)), "max_error": float(worst)}
    limits = tolerances("onnx", spec.STREAM_ENSEMBLE.name, spec.HR_FRAME.name)
    return Comparison(
        spec.STREAM_ENSEMBLE.name, FP32, "PyTorch", measured, limits, spec.HR_FRAME.name, lr.shape
    )


def compare_precision(precision: str, served: Mapping[str, Path], stages: Mapping[str, Path]) -> Comparison:
    """The served chain against the FP32 one over a hundred frames whose truth is known.

    Args:
        precision: the served one, as in the tolerances.
        served: ONNX file of every stage.
        stages: the same, FP32.
    """
    lr, truth = _sequence(FRAMES)
    scores = []
    for chain in (stages, served):
        runner = StreamRunner(chain)
        scores.append([psnr_y(runner.upscale(frame), true) for frame, true in zip(lr, truth, strict=True)])
    parent, child = (float(np.mean(score)) for score in scores)
    return Comparison(
        spec.STREAM_ENSEMBLE.name, precision, FP32, {"psnr_loss_db": parent - child},
        tolerances("sequences", precision), truth_psnr_db=child,
    )  # fmt: skip


@cache
def _sequence(count: int) -> tuple[Frames, Frames]:
    """Consecutive lr frames of the sample clip, and their truth."""
    windows, truth = reduced_windows(FIRST, count)
    return np.ascontiguousarray(windows[:, spec.WINDOW // 2]), truth
