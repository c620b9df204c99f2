"""Scores of networks and of bicubic, per clip, on clips that they were not trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.data.clips import Clip
from export.data.degradations import degrade
from export.data.evaluation_clips import EvaluationClip, Frames
from export.errors import ExportError
from export.metrics.bicubic import bicubic
from export.metrics.collage import Frame, draw_collage, lossiest_crop
from export.metrics.lpips import Lpips
from export.metrics.psnr_ssim import BORDER, Channels, psnr, ssim
from export.metrics.tof import Flow, flows, tof
from export.metrics.vmaf import vmaf
from export.network import MstGan
from export.spec import MULTIPLE_OF, SCALE, WINDOW

Upscale = Callable[[Tensor], Tensor]
"""(1, 3, H, W, 3) uint8 -> (1, 4H, 4W, 3) uint8; H and W multiples of 4."""

MARGIN = WINDOW // 2
MOVING_LEVELS = 8  # gray levels between a frame's neighbors, from which a pixel counts as moving


@dataclass(frozen=True)
class MetricConfig:
    """What is measured besides PSNR and SSIM, and by which protocol."""

    lpips: Lpips | None = None
    """LPIPS (squeeze v0.1)."""
    tof: bool = False
    """Takes longer than all the rest together."""
    vmaf: bool = False
    channels: Channels = "y"
    """Of PSNR and SSIM."""
    border: int = BORDER
    """Hr pixels left out of PSNR and SSIM on each side."""
    temporal_border: int = 0
    """Frames left out of everything at both ends of a clip."""
    single: bool = False
    """PSNR of the networks with the center frame in their neighbors' place: what one frame alone gives. It
    takes a network's time again."""


@dataclass(frozen=True)
class Metrics:
    """Means over the frames of one clip, or over clips; None where it was not measured."""

    psnr_db: float
    ssim: float
    lpips: float | None = None
    tof_px: float | None = None
    vmaf: float | None = None


@dataclass(frozen=True)
class Score:
    """One network on one clip, or on the mean of clips."""

    clip: str
    frames: int
    network: Metrics
    bicubic: Metrics
    single_psnr_db: float | None = None
    """See ``MetricConfig.single``."""

    @property
    def gain_db(self) -> float:
        """PSNR over bicubic."""
        return self.network.psnr_db - self.bicubic.psnr_db

    @property
    def gain_over_single_db(self) -> float | None:
        """PSNR over the same network on one frame, if that was measured."""
        return None if self.single_psnr_db is None else self.network.psnr_db - self.single_psnr_db


@dataclass
class _Scene:
    """Consecutive frames, of which some are scored."""

    lr: Frames
    truth: Frames
    scored: range
    true_flows: Sequence[Flow] = ()

    def window(self, t: int) -> Tensor:
        """(1, 3, H, W, 3) uint8 around frame ``t``; both ends of the clip repeat their edge frame."""
        around = np.clip(np.arange(t - MARGIN, t + MARGIN + 1), 0, len(self.lr) - 1)
        return torch.from_numpy(self.lr[around])[None]

    @property
    def truths(self) -> list[Frame]:
        """Of the scored frames."""
        return [self.truth[t] for t in self.scored]


def evaluate_clip(
    networks: Mapping[str, MstGan],
    sequence: EvaluationClip,
    config: MetricConfig | None = None,
    *,
    picture: Path | None = None,
    on_network: Callable[[], None] = lambda: None,
) -> dict[str, Score]:
    """Score networks on all frames of a clip.

    Args:
        networks: by name; in evaluation mode, all on one device.
        sequence: the clip.
        config: what is measured.
        picture: where to draw bicubic, the networks and the truth, on the frame that bicubic loses most on,
            enlarged where, among what moves, it loses most: both are chosen before any network answers.
        on_network: called after bicubic and each network.

    Returns:
        A score per network.

    Raises:
        ExportError: the temporal border leaves no frame, or for tOF not two.
    """
    config = config or MetricConfig()
    t = len(sequence.lr)
    scene = _Scene(sequence.lr, sequence.truth, range(config.temporal_border, t - config.temporal_border))
    if len(scene.scored) < (2 if config.tof else 1):
        raise ExportError(
            f"{sequence.name}: expected frames between temporal borders of {config.temporal_border}, "
            f"found {t} in all; pass a smaller --temporal-border"
        )
    if config.tof:
        scene.true_flows = flows(scene.truths)
    device = _device(networks)
    enlarged = _answers(bicubic, scene, device)
    of_bicubic = _measure(enlarged, scene, config)
    worst = int(np.argmin(_psnrs_db(enlarged, scene, config)))
    frames = {"bicubic": enlarged[worst]}
    on_network()
    scores = {}
    for name, network in networks.items():
        answers = _answers(network, scene, device)
        frames[name] = answers[worst]
        scores[name] = Score(
            sequence.name, len(answers), _measure(answers, scene, config), of_bicubic,
            _single_psnr_db(network, scene, config) if config.single else None,
        )  # fmt: skip
        on_network()
    if picture:
        at = scene.scored[worst]
        corner = lossiest_crop(enlarged[worst], scene.truth[at], _moving(scene.truth, at))
        draw_collage(picture, corner, {**frames, "truth": scene.truth[at]})
    return scores


def evaluate_segments(
    network: MstGan, clips: Sequence[Clip], segments: int, config: MetricConfig | None = None
) -> list[Score]:
    """Score a network during training: on the inner frames of a few segments of each clip, reduced by ``bi``.

    Args:
        network: in evaluation mode.
        clips: none of them trained on.
        segments: per clip, evenly spread; at most as many as there are.
        config: what is measured.

    Returns:
        A score per clip, in order.
    """
    config = config or MetricConfig()
    device = _device({"": network})
    scores = []
    for clip in clips:
        ours, enlarged, frames = list[Metrics](), list[Metrics](), 0
        for scene in _segments(clip, segments):
            if config.tof:
                scene.true_flows = flows(scene.truths)
            enlarged.append(_measure(_answers(bicubic, scene, device), scene, config))
            ours.append(_measure(_answers(network, scene, device), scene, config))
            frames += len(scene.scored)
        scores.append(Score(clip.name, frames, _average(ours), _average(enlarged)))
    return scores


def mean(scores: Sequence[Score]) -> Score:
    """Mean over clips, each counting the same."""
    singles = [score.single_psnr_db for score in scores if score.single_psnr_db is not None]
    return Score(
        "mean",
        sum(score.frames for score in scores),
        _average([score.network for score in scores]),
        _average([score.bicubic for score in scores]),
        float(np.mean(singles)) if singles else None,
    )


def as_json(scores: Mapping[str, Sequence[Score]]) -> dict[str, list[dict[str, object]]]:
    """Per network rows for a machine, the mean last."""
    return {name: [asdict(score) for score in (*rows, mean(rows))] for name, rows in scores.items()}


def _device(networks: Mapping[str, MstGan]) -> torch.device:
    return next(next(iter(networks.values())).parameters()).device


def _segments(clip: Clip, segments: int) -> Iterator[_Scene]:
    multiple = SCALE * MULTIPLE_OF
    height, width = (side // multiple * multiple for side in clip.segments.shape[2:4])
    for index in np.unique(np.linspace(0, len(clip.segments) - 1, segments).round().astype(int)):
        truth = np.array(clip.segments[index, :, :height, :width])
        yield _Scene(degrade("bi", truth), truth, range(MARGIN, len(truth) - MARGIN))


def _single(network: Upscale) -> Upscale:
    """The same network, given one frame alone: three times the center of its window."""
    return lambda lr_window: network(lr_window[:, MARGIN : MARGIN + 1].expand(-1, WINDOW, -1, -1, -1))


@torch.inference_mode()
def _answers(upscale: Upscale, scene: _Scene, device: torch.device) -> list[Frame]:
    """Of the scored frames; padded by their edges and cropped again, as the client does it."""
    h, w = scene.lr.shape[1:3]
    below, right = -h % MULTIPLE_OF, -w % MULTIPLE_OF
    answers = []
    for t in scene.scored:
        window = scene.window(t).permute(0, 1, 4, 2, 3).flatten(0, 1).float()
        padded = torch.nn.functional.pad(window, (0, right, 0, below), "replicate").to(torch.uint8)
        lr_window = padded.permute(0, 2, 3, 1)[None].to(device)
        answers.append(upscale(lr_window)[0, : SCALE * h, : SCALE * w].cpu().numpy())
    return answers


def _psnrs_db(answers: Sequence[Frame], scene: _Scene, config: MetricConfig) -> list[float]:
    pairs = zip(answers, scene.truths, strict=True)
    return [psnr(*pair, channels=config.channels, border=config.border) for pair in pairs]


def _single_psnr_db(network: MstGan, scene: _Scene, config: MetricConfig) -> float:
    answers = _answers(_single(network), scene, _device({"": network}))
    return float(np.mean(_psnrs_db(answers, scene, config)))


def _measure(answers: Sequence[Frame], scene: _Scene, config: MetricConfig) -> Metrics:
    pairs = list(zip(answers, scene.truths, strict=True))
    lpips = config.lpips
    return Metrics(
        float(np.mean(_psnrs_db(answers, scene, config))),
        float(np.mean([ssim(*pair, channels=config.channels, border=config.border) for pair in pairs])),
        float(np.mean([lpips.of_frames(*pair) for pair in pairs])) if lpips else None,
        tof(answers, scene.true_flows) if config.tof else None,
        vmaf(answers, scene.truths) if config.vmaf else None,
    )


def _moving(truth: Frames, t: int) -> NDArray[np.bool_]:
    """(H, W): where the frames before and after differ."""
    before, after = truth[max(t - 1, 0)], truth[min(t + 1, len(truth) - 1)]
    return np.abs(after.astype(np.int16) - before).mean(2) > MOVING_LEVELS


def _average(metrics: Sequence[Metrics]) -> Metrics:
    def average(name: str) -> float | None:
        values = [getattr(m, name) for m in metrics]
        return None if None in values else float(np.mean(values))

    return Metrics(**{f.name: average(f.name) for f in fields(Metrics)})  # type: ignore[arg-type]
