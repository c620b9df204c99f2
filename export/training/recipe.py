"""The whole recipe within one budget of wall time: footage in, every checkpoint of the project out."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from export.checkpoint import load_checkpoint
from export.data.clips import Clip
from export.errors import ExportError
from export.network import WIDTHS
from export.training.evaluation import Instruments
from export.training.imitation import Teacher
from export.training.options import FRESH_LEARNING_RATE, OPTIMIZER_OF, PIXEL_LOSS_OF, TrainOptions
from export.training.perceptual import DistilledVgg
from export.training.prune import SparseTrainer, find_groups, finish
from export.training.selection import watched
from export.training.trainer import BEST_FILE, EMA_FILE, LONG, Trainer

log = logging.getLogger(__name__)

RESERVE = 0.05  # of the time: reading footage, and each stage's scores after its last step
WINDOWS_PER_LONG_CROP = LONG - 2
SPARSITY = 0.1


@dataclass(frozen=True)
class Stage:
    """One training run of the recipe."""

    name: str
    """Of its run folder."""
    widths: str
    share: float
    """Of the time, in proportion."""
    objective: str = "fidelity"
    start: str | None = None
    """Stage whose answer it starts from, grown if it is smaller."""
    teacher: str | None = None
    """Stage whose answer it learns from."""
    teacher_weight: float = 1.0
    turned_teacher: bool = False
    pixel_loss: str | None = None
    """If not its objective's."""
    prunes_to: str | None = None
    """Trains under the sparsity penalty, and its answer is pruned to these widths."""
    delivers: str | None = None
    """File name of the checkpoint, if this is one to serve."""
    lr: float = 4e-4
    warmup: int = 500
    temporal_weight: float = 0.0
    validate_every: int = 2000

    def answer(self, out: Path) -> Path:
        """The checkpoint it leaves under ``out``."""
        if self.prunes_to:
            return out / f"{self.name}.safetensors"
        return out / self.name / (BEST_FILE if self.objective == "adversarial" else EMA_FILE)


STAGES = (
    Stage("trunk", "baseline_trunk", 0.38, lr=FRESH_LEARNING_RATE),
    Stage("baseline", "baseline", 0.06, start="trunk", delivers="mst_gan_baseline"),
    Stage("sparse", "baseline", 0.06, start="baseline", prunes_to="pruned", lr=1e-4, warmup=100),
    Stage(
        "pruned", "pruned", 0.20, start="sparse", teacher="baseline", lr=2e-4, warmup=100,
        delivers="mst_gan_pruned",
    ),
    Stage(
        "perceptual", "pruned", 0.12, objective="adversarial", start="pruned", lr=3e-4, warmup=100,
        temporal_weight=5.0, validate_every=500, delivers="mst_gan_pruned_gan",
    ),
    Stage(
        "compact", "compact", 0.06, teacher="trunk", teacher_weight=10.0, turned_teacher=True,
        pixel_loss="squared", lr=FRESH_LEARNING_RATE, delivers="mst_gan_compact",
    ),
    Stage(
        "student", "student", 0.12, teacher="trunk", teacher_weight=10.0, turned_teacher=True,
        pixel_loss="squared", lr=FRESH_LEARNING_RATE, delivers="mst_gan_student",
    ),
)  # fmt: skip
"""What follows what, and for how long. The baseline's detail enhancement learns first, alone, and longest:
nearly all that was gained so far is its work, and after 31 000 steps of 32 crops it still learned. What a
discriminator gives it gives early: 1 400 steps of 8 long crops took LPIPS to two thirds."""


@dataclass(frozen=True)
class Footage:
    """What all stages learn from and are scored on."""

    clips: Sequence[Clip]
    photos: Sequence[Clip]
    validation: Sequence[Clip]


def planned() -> list[Stage]:
    """The stages; their shares sum to 1, less the reserve."""
    total = sum(stage.share for stage in STAGES)
    return [replace(stage, share=(1 - RESERVE) * stage.share / total) for stage in STAGES]


def train_all(
    options: TrainOptions,
    minutes: float,
    footage: Footage,
    out: Path,
    perceptual: DistilledVgg,
    instruments: Instruments,
    teachers: Sequence[Teacher] = (),
) -> list[Path]:
    """Run every stage, or what an earlier call has left of them.

    Scores on the way are of the centres of the validation clips, see ``selection.watched``.

    Args:
        options: batch, patch, steps a stage may take at most, seed and arithmetic; the rest is the recipe's.
        minutes: wall time of all stages and calls together.
        footage: for all stages.
        out: holds a run folder per stage, and the delivered checkpoints.
        perceptual: network of the perceptual loss.
        instruments: with LPIPS and tOF.
        teachers: of every stage that learns for fidelity, beside its own.

    Returns:
        The delivered checkpoints.

    Raises:
        ExportError: a stage failed or was stopped; the same call goes on from there.
    """
    out.mkdir(parents=True, exist_ok=True)
    stages = {stage.name: stage for stage in planned()}
    centres = replace(footage, validation=watched(footage.validation))
    delivered = []
    for stage in stages.values():
        mine = _options(stage, options, minutes)
        answer = stage.answer(out)
        trainer = _trainer(stage, stages, mine, centres, out, perceptual, instruments, teachers)
        if trainer.progress(trainer.step) < 1:
            log.info("stage %s: %.1f minutes in all", stage.name, mine.minutes)
            trainer.run()
        if (progress := trainer.progress(trainer.step)) < 1:
            raise ExportError(
                f"expected the whole of stage {stage.name}, found {progress:.0%} of it: the same command "
                "goes on from there"
            )
        if isinstance(trainer, SparseTrainer) and stage.prunes_to and not answer.exists():
            log.info(finish(trainer, WIDTHS[stage.prunes_to], answer))
        del trainer  # before the next one asks for the device's memory
        if stage.delivers:
            delivered.append(out / f"{stage.delivers}.safetensors")
            shutil.copyfile(answer, delivered[-1])
    return delivered


def _options(stage: Stage, options: TrainOptions, minutes: float) -> TrainOptions:
    is_long = stage.temporal_weight > 0 or stage.objective == "adversarial"
    return replace(
        options,
        widths=stage.widths,
        minutes=minutes * stage.share,
        objective=stage.objective,
        optimizer="adam" if stage.prunes_to else OPTIMIZER_OF[stage.objective],
        pixel_loss=stage.pixel_loss or PIXEL_LOSS_OF[stage.objective],
        teacher_weight=stage.teacher_weight,
        turned_teacher=stage.turned_teacher,
        lr=stage.lr,
        warmup=stage.warmup,
        temporal_weight=stage.temporal_weight,
        validate_every=stage.validate_every,
        # As many windows per step, whatever the crops' length.
        batch=max(1, options.batch // WINDOWS_PER_LONG_CROP) if is_long else options.batch,
    )


def _trainer(
    stage: Stage,
    stages: dict[str, Stage],
    options: TrainOptions,
    footage: Footage,
    out: Path,
    perceptual: DistilledVgg,
    instruments: Instruments,
    teachers: Sequence[Teacher],
) -> Trainer:
    start = load_checkpoint(stages[stage.start].answer(out)) if stage.start else None
    data = (footage.clips, footage.photos, footage.validation, out / stage.name)
    if stage.prunes_to and start:
        groups = find_groups(WIDTHS[stage.widths], WIDTHS[stage.prunes_to])
        return SparseTrainer(groups, SPARSITY, options, *data, start)
    if stage.objective == "adversarial":
        return Trainer(options, *data, start, perceptual=perceptual, instruments=instruments)
    own = [load_checkpoint(stages[stage.teacher].answer(out))] if stage.teacher else []
    return Trainer(options, *data, start, [*own, *teachers])
