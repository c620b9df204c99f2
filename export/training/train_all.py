"""Every checkpoint of the project within one budget of wall time: a recipe of several stages."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from export.checkpoint import load_checkpoint
from export.data.clips import Clip
from export.errors import ExportError
from export.network import WIDTHS
from export.training.best_checkpoint import validation_crops
from export.training.config import Config, make_config
from export.training.evaluate import MetricConfig
from export.training.perceptual import DistilledVgg
from export.training.prune import SparseTrainer, find_groups, finish
from export.training.trainer import BEST_FILE, EMA_FILE, LONG, Trainer

log = logging.getLogger(__name__)

RESERVE = 0.05  # of the time: reading clips, and each stage's scores after its last step
WINDOWS_PER_LONG_CROP = LONG - 2


@dataclass(frozen=True)
class Stage:
    """One training run of a recipe; ``init`` and ``teacher`` of its configuration name earlier stages."""

    name: str
    """Of its run folder."""
    share: float
    """Of the time, in proportion."""
    config: Config
    deliver: str | None = None
    """File name of the checkpoint, if this is one to serve."""

    def result(self, out: Path) -> Path:
        """The checkpoint that it leaves under ``out``."""
        if self.config.prune_to:
            return out / f"{self.name}.safetensors"
        return out / self.name / (BEST_FILE if self.config.objective == "adversarial" else EMA_FILE)


@dataclass(frozen=True)
class Footage:
    """What all stages train on and are scored on."""

    clips: Sequence[Clip]
    photos: Sequence[Clip]
    validation: Sequence[Clip]


def read_stages(recipe: Mapping[str, Any], settings: Mapping[str, object], source: str) -> list[Stage]:
    """The stages of a recipe; their shares sum to 1, less the reserve.

    Args:
        recipe: ``[[stages]]`` with ``name``, ``share``, perhaps ``deliver``, and settings of a run; other
            settings of a run hold for all stages, and those of a stage override them.
        settings: of all stages; they override the recipe's of all stages.
        source: where the recipe comes from, for errors.

    Raises:
        ExportError: a setting is wrong, or a stage starts or learns from one that does not come before it.
    """
    common = {name: value for name, value in recipe.items() if name != "stages"}
    tables = recipe.get("stages")
    if not isinstance(tables, list) or not tables or not all(isinstance(t, dict) for t in tables):
        raise ExportError(f"expected [[stages]] in {source}, found none; pass a recipe of several stages")
    stages: list[Stage] = []
    for table in tables:
        where = f"stage {table.get('name', len(stages) + 1)} of {source}"
        own = {"name": str, "share": (int, float)}
        for name, kind in own.items():
            if not isinstance(table.get(name), kind):  # type: ignore[arg-type]
                raise ExportError(f"expected a {name} of {where}, found {table.get(name)!r}; correct it")
        run = {name: value for name, value in table.items() if name not in (*own, "deliver")}
        config = make_config(common, settings, run, source=where)
        for widths in (config.widths, config.prune_to):
            if widths is not None and widths not in WIDTHS:
                raise ExportError(
                    f"expected widths of {where} to be one of {', '.join(WIDTHS)}, found {widths!r}"
                )
        before = {stage.name for stage in stages}
        for role in ("init", "teacher"):
            needed = getattr(config, role)
            if needed is not None and needed not in before:
                raise ExportError(f"expected {role} of {where} to be an earlier stage, found {needed!r}")
        stages.append(Stage(table["name"], float(table["share"]), config, table.get("deliver")))
    total = sum(stage.share for stage in stages)
    return [replace(stage, share=(1 - RESERVE) * stage.share / total) for stage in stages]


def train_all(
    stages: Sequence[Stage],
    minutes: float,
    footage: Footage,
    out: Path,
    perceptual: DistilledVgg,
    metrics: MetricConfig,
) -> list[Path]:
    """Run every stage, or what an earlier call has left of them.

    Stages are validated on the centers of the validation clips, see ``validation_crops``.

    Args:
        stages: see `read_stages`.
        minutes: wall time of all stages and calls together.
        footage: for all stages.
        out: holds a run folder per stage, and the delivered checkpoints.
        perceptual: network of the perceptual loss.
        metrics: with LPIPS and tOF.

    Returns:
        The delivered checkpoints.

    Raises:
        ExportError: a stage failed or was stopped; the same call resumes it.
    """
    out.mkdir(parents=True, exist_ok=True)
    results = {stage.name: stage.result(out) for stage in stages}
    crops = replace(footage, validation=validation_crops(footage.validation))
    delivered = []
    for stage in stages:
        trainer = _trainer(stage, results, minutes, crops, out, perceptual, metrics)
        if trainer.progress(trainer.step) < 1:
            log.info("stage %s: %.1f minutes in all", stage.name, minutes * stage.share)
            trainer.run()
        if (progress := trainer.progress(trainer.step)) < 1:
            raise ExportError(
                f"expected the whole of stage {stage.name}, found {progress:.0%} of it: run the same command "
                "again to resume"
            )
        result = results[stage.name]
        if isinstance(trainer, SparseTrainer) and stage.config.prune_to and not result.exists():
            log.info(finish(trainer, WIDTHS[stage.config.prune_to], result))
        del trainer  # frees the device's memory for the next one
        if stage.deliver:
            delivered.append(out / f"{stage.deliver}.safetensors")
            shutil.copyfile(result, delivered[-1])
    return delivered


def _trainer(
    stage: Stage,
    results: Mapping[str, Path],
    minutes: float,
    footage: Footage,
    out: Path,
    perceptual: DistilledVgg,
    metrics: MetricConfig,
) -> Trainer:
    config = replace(stage.config, minutes=minutes * stage.share)
    if config.temporal_weight > 0 or config.objective == "adversarial":
        # As many windows per step, whatever the crops' length.
        config = replace(config, batch=max(1, config.batch // WINDOWS_PER_LONG_CROP))
    start = load_checkpoint(results[config.init]) if config.init else None
    teacher = load_checkpoint(results[config.teacher]) if config.teacher else None
    data = (footage.clips, footage.photos, footage.validation, out / stage.name)
    if config.prune_to and start:
        groups = find_groups(WIDTHS[config.widths], WIDTHS[config.prune_to])
        return SparseTrainer(groups, config, *data, start)
    if config.objective == "adversarial":
        return Trainer(config, *data, start, perceptual=perceptual, metrics=metrics)
    return Trainer(config, *data, start, teacher)
