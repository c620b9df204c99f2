"""Scores of a network beside bicubic's, per clip, on footage it was not trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from export.network import MstGan, PixelShuffle
from export.network.bicubic import BicubicSubpixels
from export.spec import CHANNELS, MULTIPLE_OF, SCALE, WINDOW
from export.training.footage import Clip
from export.training.metrics import psnr_y, ssim_y
from export.training.pictures import Frame, compare, lossiest_crop
from export.training.windows import downscale

Upscale = Callable[[Tensor], Tensor]
"""(1, 3, H, W, 3) uint8 -> (1, 4H, 4W, 3) uint8."""


@dataclass(frozen=True)
class Score:
    """Means over the frames of one clip, or over clips."""

    clip: str
    frames: int
    psnr_y_db: float
    ssim_y: float
    bicubic_psnr_y_db: float
    bicubic_ssim_y: float
    single_psnr_y_db: float
    """The same network with the centre frame in its neighbours' place: what one frame alone would give."""

    @property
    def gain_db(self) -> float:
        """PSNR-Y over bicubic."""
        return self.psnr_y_db - self.bicubic_psnr_y_db


def bicubic(lr_window: Tensor) -> Tensor:
    """The centre frame upscaled by Keys' cubic: what every score is compared with."""
    centre = lr_window[:, WINDOW // 2].permute(0, 3, 1, 2).float() / 255
    return PixelShuffle()(BicubicSubpixels(CHANNELS, SCALE)(centre))


def pairs(clip: Clip, segments: int) -> Iterator[tuple[Tensor, Frame]]:
    """Whole-frame windows and their truth, from evenly spread segments.

    Yields:
        (1, 3, H, W, 3) uint8 window and (4H, 4W, 3) uint8 truth of its centre frame.
    """
    granule = SCALE * MULTIPLE_OF
    chosen = np.unique(np.linspace(0, clip.segments.shape[0] - 1, segments).round().astype(int))
    for index in chosen:
        height, width = (side // granule * granule for side in clip.segments.shape[2:4])
        hr = torch.from_numpy(np.array(clip.segments[index, :, :height, :width]))
        lr = downscale(hr.permute(0, 3, 1, 2).float() / 255)
        lr_frames = (lr * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
        for centre in range(WINDOW // 2, len(hr) - WINDOW // 2):
            around = slice(centre - WINDOW // 2, centre + WINDOW // 2 + 1)
            yield lr_frames[around].unsqueeze(0), hr[centre].numpy()


@torch.inference_mode()
def _upscale(upscale: Upscale, lr_window: Tensor) -> Frame:
    return upscale(lr_window)[0].cpu().numpy()


def evaluate(network: MstGan, clips: Sequence[Clip], segments: int) -> list[Score]:
    """Score each clip on evenly spread segments."""
    device = next(network.parameters()).device
    scores = []
    for clip in clips:
        rows = []
        for lr_window, truth in pairs(clip, segments):
            lr_window = lr_window.to(device)
            single = lr_window[:, WINDOW // 2 : WINDOW // 2 + 1].expand(-1, WINDOW, -1, -1, -1)
            ours, one_frame = _upscale(network, lr_window), _upscale(network, single)
            enlarged = _upscale(bicubic, lr_window)
            rows.append(
                (
                    psnr_y(ours, truth),
                    ssim_y(ours, truth),
                    psnr_y(enlarged, truth),
                    ssim_y(enlarged, truth),
                    psnr_y(one_frame, truth),
                )
            )
        scores.append(Score(clip.name, len(rows), *np.mean(rows, axis=0).tolist()))
    return scores


def illustrate(network: MstGan, clip: Clip, path: Path) -> None:
    """Draw the frame of a clip, and in it the detail, where bicubic loses most: chosen before our answer."""
    lr_window, truth = min(
        pairs(clip, segments=1), key=lambda pair: psnr_y(_upscale(bicubic, pair[0]), pair[1])
    )
    enlarged = _upscale(bicubic, lr_window)
    frames = {"bicubic": enlarged, "MST-GAN": _upscale(network, lr_window), "truth": truth}
    compare(path, lossiest_crop(enlarged, truth), frames)


def mean(scores: Sequence[Score]) -> Score:
    """Mean over clips, each counting the same."""
    values = [astuple(score)[2:] for score in scores]
    return Score("mean", sum(score.frames for score in scores), *np.mean(values, axis=0).tolist())


def markdown(scores: Sequence[Score]) -> str:
    """A table for the model card."""
    lines = [
        "| clip | frames | bicubic PSNR-Y / SSIM-Y | PSNR-Y / SSIM-Y | over bicubic | over one frame |",
        "|---|---|---|---|---|---|",
    ]
    for s in (*scores, mean(scores)):
        lines.append(
            f"| {s.clip} | {s.frames} | {s.bicubic_psnr_y_db:.2f} / {s.bicubic_ssim_y:.4f} "
            f"| {s.psnr_y_db:.2f} / {s.ssim_y:.4f} | {s.gain_db:+.2f} dB "
            f"| {s.psnr_y_db - s.single_psnr_y_db:+.2f} dB |"
        )
    return "\n".join(lines)


def as_json(scores: Sequence[Score]) -> list[dict[str, object]]:
    """Rows for a machine, the mean last."""
    return [asdict(score) for score in (*scores, mean(scores))]
