"""Which checkpoint of an adversarial run is the one to keep: not the last, but the best by this rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from export.data.clips import Clip
from export.errors import ExportError
from export.training.evaluation import Measures

MAX_LOSS_DB = 1.0  # of PSNR-Y, against the start of the run
MAX_TOF = 1.05  # over that at the start of the run
WATCHED_SIDE = 256  # hr pixels of a validation clip's centre: tOF of whole frames takes longer than training


class Selection:
    """Lowest LPIPS among those that lose at most 1 dB of PSNR-Y and whose tOF is at most 5 % worse.

    Both against the weights at the start of the run, which are the first candidate: a run that only does
    harm keeps what it was given.
    """

    def __init__(self) -> None:
        """Nothing seen yet."""
        self.start: Measures | None = None
        self.best_lpips: float | None = None
        self.best_step = 0

    def admit(self, found: Measures, step: int) -> bool:
        """Whether this, of ``step``, is the best so far; the first one seen is the start of the run.

        Raises:
            ExportError: LPIPS or tOF was not measured.
        """
        if found.lpips is None or found.tof_px is None:
            raise ExportError("expected LPIPS and tOF to choose a checkpoint by, found one not measured")
        self.start = self.start or found
        assert self.start.tof_px is not None
        allowed = (
            found.psnr_y_db >= self.start.psnr_y_db - MAX_LOSS_DB
            and found.tof_px <= MAX_TOF * self.start.tof_px
        )
        if not allowed or (self.best_lpips is not None and found.lpips >= self.best_lpips):
            return False
        self.best_lpips, self.best_step = found.lpips, step
        return True

    def state_dict(self) -> dict[str, object]:
        """All that a resumed run needs."""
        return {
            "start": asdict(self.start) if self.start else None,
            "best_lpips": self.best_lpips,
            "best_step": self.best_step,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a ``state_dict``."""
        self.start = Measures(**state["start"]) if state["start"] else None
        self.best_lpips, self.best_step = state["best_lpips"], state["best_step"]


def watched(clips: Sequence[Clip]) -> list[Clip]:
    """The centres of clips, at most 256 hr pixels a side: all that is scored during an adversarial run."""
    centres = []
    for clip in clips:
        y, x = (max(0, side - WATCHED_SIDE) // 2 for side in clip.segments.shape[2:4])
        centres.append(Clip(clip.name, clip.segments[:, :, y : y + WATCHED_SIDE, x : x + WATCHED_SIDE]))
    return centres
