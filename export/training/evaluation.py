"""Scores of networks beside bicubic's, per clip, on footage they were not trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.data.clips import Clip
from export.data.degradations import degrade
from export.metrics.bicubic import bicubic
from export.metrics.collage import Frame, draw_collage, lossiest_crop
from export.metrics.lpips import Lpips
from export.metrics.psnr_ssim import psnr_y, ssim_y
from export.metrics.tof import flows, tof
from export.metrics.vmaf import vmaf
from export.network import MstGan
from export.spec import MULTIPLE_OF, SCALE, WINDOW

Upscale = Callable[[Tensor], Tensor]
"""(1, 3, H, W, 3) uint8 -> (1, 4H, 4W, 3) uint8."""

MARGIN = WINDOW // 2
MOVING_LEVELS = 8  # grey levels between a frame's neighbours, from which a pixel counts as moving


@dataclass(frozen=True)
class Instruments:
    """What is measured besides PSNR-Y and SSIM-Y."""

    lpips: Lpips | None = None
    """LPIPS (squeeze v0.1)."""
    flicker: bool = False
    """tOF: takes longer than all the rest together."""
    vmaf: bool = False


@dataclass(frozen=True)
class Measures:
    """Means over the frames of one clip, or over clips; None where an instrument was left out."""

    psnr_y_db: float
    ssim_y: float
    lpips: float | None = None
    tof_px: float | None = None
    vmaf: float | None = None


@dataclass(frozen=True)
class Score:
    """One network on one clip, or on the mean of clips."""

    clip: str
    frames: int
    network: Measures
    bicubic: Measures
    single_psnr_y_db: float
    """The same network with the centre frame in its neighbours' place: what one frame alone would give."""

    @property
    def psnr_y_db(self) -> float:
        """PSNR-Y of the network."""
        return self.network.psnr_y_db

    @property
    def bicubic_psnr_y_db(self) -> float:
        """PSNR-Y of bicubic."""
        return self.bicubic.psnr_y_db

    @property
    def gain_db(self) -> float:
        """PSNR-Y over bicubic."""
        return self.psnr_y_db - self.bicubic_psnr_y_db


@dataclass
class _Segment:
    """Consecutive windows of one clip and their truth."""

    lr_windows: list[Tensor]
    """(1, 3, H, W, 3) uint8 each."""
    truth: list[Frame]
    """(4H, 4W, 3) uint8 each."""
    moving: list[NDArray[np.bool_]]
    """(4H, 4W) each: where the frames before and after differ."""
    true_flows: list[NDArray[np.float32]] = field(default_factory=list)


def single(network: Upscale) -> Upscale:
    """The same network, given one frame alone: three times the centre of its window."""
    return lambda lr_window: network(lr_window[:, MARGIN : MARGIN + 1].expand(-1, WINDOW, -1, -1, -1))


def chosen_segments(clip: Clip, segments: int) -> list[int]:
    """Which segments of a clip are scored: evenly spread, at most as many as there are."""
    return np.unique(np.linspace(0, len(clip.segments) - 1, segments).round().astype(int)).tolist()


def _segments(clip: Clip, segments: int, degradation: str) -> Iterator[_Segment]:
    granule = SCALE * MULTIPLE_OF
    height, width = (side // granule * granule for side in clip.segments.shape[2:4])
    for index in chosen_segments(clip, segments):
        hr = np.array(clip.segments[index, :, :height, :width])
        images = torch.from_numpy(hr).permute(0, 3, 1, 2).float()[None] / 255
        lr = degrade(degradation, images, np.random.default_rng(index))[0]
        lr_frames = (lr * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
        centres = range(MARGIN, len(hr) - MARGIN)
        change = [np.abs(hr[t + 1].astype(np.int16) - hr[t - 1]).mean(2) for t in centres]
        yield _Segment(
            [lr_frames[t - MARGIN : t + MARGIN + 1].unsqueeze(0) for t in centres],
            [hr[t] for t in centres],
            [levels > MOVING_LEVELS for levels in change],
        )


@torch.inference_mode()
def _answers(upscale: Upscale, segment: _Segment, device: torch.device) -> list[Frame]:
    return [upscale(lr_window.to(device))[0].cpu().numpy() for lr_window in segment.lr_windows]


def _measure(answers: list[Frame], segment: _Segment, instruments: Instruments) -> Measures:
    pairs = list(zip(answers, segment.truth, strict=True))
    lpips = instruments.lpips
    return Measures(
        float(np.mean([psnr_y(image, truth) for image, truth in pairs])),
        float(np.mean([ssim_y(image, truth) for image, truth in pairs])),
        float(np.mean([lpips.of_frames(image, truth) for image, truth in pairs])) if lpips else None,
        tof(answers, segment.true_flows) if instruments.flicker else None,
        vmaf(answers, segment.truth) if instruments.vmaf else None,
    )


def _average(measures: Sequence[Measures]) -> Measures:
    def average(name: str) -> float | None:
        values = [getattr(m, name) for m in measures]
        return None if None in values else float(np.mean(values))

    return Measures(**{f.name: average(f.name) for f in fields(Measures)})  # type: ignore[arg-type]


def evaluate_all(
    networks: Mapping[str, MstGan],
    clips: Sequence[Clip],
    segments: int,
    instruments: Instruments | None = None,
    *,
    degradation: str = "bi",
    on_segment: Callable[[], None] = lambda: None,
) -> dict[str, list[Score]]:
    """Score networks on the same frames.

    Args:
        networks: by name; in evaluation mode, all on one device.
        clips: footage, none of it trained on.
        segments: per clip, evenly spread.
        instruments: what is measured besides PSNR-Y and SSIM-Y.
        degradation: how lr frames are made.
        on_segment: called after each segment.

    Returns:
        Per network one score per clip, in order.
    """
    instruments = instruments or Instruments()
    device = next(next(iter(networks.values())).parameters()).device
    scores: dict[str, list[Score]] = {name: [] for name in networks}
    for clip in clips:
        frames = 0
        enlarged: list[Measures] = []
        ours: dict[str, list[Measures]] = {name: [] for name in networks}
        alone: dict[str, list[Measures]] = {name: [] for name in networks}
        for segment in _segments(clip, segments, degradation):
            frames += len(segment.truth)
            if instruments.flicker:
                segment.true_flows = flows(segment.truth)
            enlarged.append(_measure(_answers(bicubic, segment, device), segment, instruments))
            for name, network in networks.items():
                ours[name].append(_measure(_answers(network, segment, device), segment, instruments))
                alone[name].append(
                    _measure(_answers(single(network), segment, device), segment, Instruments())
                )
            on_segment()
        for name in networks:
            scores[name].append(
                Score(
                    clip.name, frames, _average(ours[name]), _average(enlarged),
                    _average(alone[name]).psnr_y_db,
                )
            )  # fmt: skip
    return scores


def evaluate(
    network: MstGan, clips: Sequence[Clip], segments: int, instruments: Instruments | None = None
) -> list[Score]:
    """Score one network per clip on ``bi``; as `evaluate_all`."""
    return evaluate_all({"": network}, clips, segments, instruments)[""]


def mean(scores: Sequence[Score]) -> Score:
    """Mean over clips, each counting the same."""
    return Score(
        "mean",
        sum(score.frames for score in scores),
        _average([score.network for score in scores]),
        _average([score.bicubic for score in scores]),
        float(np.mean([score.single_psnr_y_db for score in scores])),
    )


def illustrate(networks: Mapping[str, MstGan], clip: Clip, path: Path, degradation: str = "bi") -> None:
    """Draw bicubic, the networks and the truth on the frame of a clip where bicubic loses most.

    The enlarged detail is where, among what moves, bicubic loses most: both are chosen before our answer.
    """
    device = next(next(iter(networks.values())).parameters()).device
    (segment,) = _segments(clip, 1, degradation)
    enlarged = _answers(bicubic, segment, device)
    worst = min(range(len(enlarged)), key=lambda i: psnr_y(enlarged[i], segment.truth[i]))
    window = _Segment([segment.lr_windows[worst]], [], [])
    frames = {"bicubic": enlarged[worst]}
    frames |= {name: _answers(network, window, device)[0] for name, network in networks.items()}
    frames["truth"] = segment.truth[worst]
    draw_collage(path, lossiest_crop(enlarged[worst], segment.truth[worst], segment.moving[worst]), frames)


def as_json(scores: Mapping[str, Sequence[Score]]) -> dict[str, list[dict[str, object]]]:
    """Per network rows for a machine, the mean last."""
    return {name: [asdict(score) for score in (*rows, mean(rows))] for name, rows in scores.items()}
