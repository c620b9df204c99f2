"""PSNR-Y by frame, of recurrent and window networks on the same scenes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.data.clips import is_cut
from export.data.evaluation_clips import EvaluationClip, Source, load_evaluation_clip
from export.metrics.bicubic import bicubic
from export.metrics.psnr_ssim import psnr_y
from export.network import MstGan
from export.network.stream import StreamNetwork
from export.spec import MULTIPLE_OF, SCALE, WINDOW

AGES = (0, 1, 2, 3, 5, 10, 20, 50, 100, 300, 600)
"""Limits of the groups that frames are averaged over, by how many came before."""


def first_scene(source: Source, cache: Path, frames: int) -> EvaluationClip:
    """At most ``frames`` of a clip, up to its first cut, cropped to a multiple of what networks take."""
    clip = load_evaluation_clip(source, cache)
    cuts = (t for t in range(1, len(clip.truth)) if is_cut(clip.truth[t - 1], clip.truth[t]))
    end = min(next(cuts, len(clip.truth)), frames)
    h, w = (side // MULTIPLE_OF * MULTIPLE_OF for side in clip.lr.shape[1:3])
    return EvaluationClip(clip.name, clip.truth[:end, : SCALE * h, : SCALE * w], clip.lr[:end, :h, :w])


def psnr_by_frame(network: StreamNetwork | MstGan | None, scene: EvaluationClip) -> NDArray[np.float64]:
    """(T,) dB of a network, or of bicubic for None; a window network sees edge frames repeated."""
    lr = torch.from_numpy(np.array(scene.lr))
    answers = network.upscale(lr) if isinstance(network, StreamNetwork) else _windows(network or bicubic, lr)
    return np.array([psnr_y(hr.numpy(), truth) for hr, truth in zip(answers, scene.truth, strict=True)])


def by_age(gain: NDArray[np.float64]) -> dict[str, float]:
    """Means over groups of frames, named as "2" and "5-9", where the scene reaches them; and "all"."""
    groups = {
        (f"{a}-{b - 1}" if b - a > 1 else f"{a}"): float(gain[a:b].mean())
        for a, b in pairwise(AGES)
        if len(gain) > a
    }
    return {**groups, "all": float(gain.mean())}


def mean_by_age(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means over clips, each counting the same; a group without all of them is left out."""
    names = [name for name in rows[0] if all(name in row for row in rows)]
    return {name: float(np.mean([row[name] for row in rows])) for name in names}


@torch.inference_mode()
def _windows(upscale: Callable[[Tensor], Tensor], lr: Tensor) -> Iterable[Tensor]:
    for t in range(len(lr)):
        around = [min(max(t + offset, 0), len(lr) - 1) for offset in range(-(WINDOW // 2), WINDOW // 2 + 1)]
        yield upscale(lr[around][None])[0]
