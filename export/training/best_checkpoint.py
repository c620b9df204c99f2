"""Which checkpoint of an adversarial run to keep: not the last, but the best by this rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from export.data.clips import Clip
from export.errors import ExportError
from export.training.evaluate import Metrics

MAX_LOSS_DB = 1.0  # of PSNR-Y, against the start of the run
MAX_TOF = 1.05  # over that at the start of the run
CROP_SIDE = 256  # hr pixels of a validation clip's center: tOF of whole frames takes longer than training


class BestCheckpoint:
    """Lowest LPIPS among those that lose at most 1 dB of PSNR-Y and whose tOF is at most 5 % worse.

    Both against the weights at the start of the run, which are the first candidate: a run that only does harm
    keeps what it was given.
    """

    def __init__(self) -> None:
        """No candidate yet."""
        self.start: Metrics | None = None
        self.lpips: float | None = None
        self.step = 0

    def is_best(self, found: Metrics, step: int) -> bool:
        """Whether the checkpoint of ``step`` is the best so far; the first candidate is the run's start.

        Raises:
            ExportError: LPIPS or tOF was not measured.
        """
        if found.lpips is None or found.tof_px is None:
            raise ExportError("expected LPIPS and tOF to choose a checkpoint by, found one not measured")
        self.start = self.start or found
        assert self.start.tof_px is not None
        allowed = (
            found.psnr_db >= self.start.psnr_db - MAX_LOSS_DB and found.tof_px <= MAX_TOF * self.start.tof_px
        )
        if not allowed or (self.lpips is not None and found.lpips >= self.lpips):
            return False
        self.lpips, self.step = found.lpips, step
        return True

    def state_dict(self) -> dict[str, object]:
        """All that a resumed run needs."""
        return {
            "start": asdict(self.start) if self.start else None,
            "lpips": self.lpips,
            "step": self.step,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a ``state_dict``."""
        self.start = Metrics(**state["start"]) if state["start"] else None
        self.lpips, self.step = state["lpips"], state["step"]


def validation_crops(clips: Sequence[Clip]) -> list[Clip]:
    """The centers of clips, at most 256 hr pixels a side: all that an adversarial run is validated on."""
    centers = []
    for clip in clips:
        y, x = (max(0, side - CROP_SIDE) // 2 for side in clip.segments.shape[2:4])
        centers.append(Clip(clip.name, clip.segments[:, :, y : y + CROP_SIDE, x : x + CROP_SIDE]))
    return centers
