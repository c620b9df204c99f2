"""``python -m export train``, ``prune`` and ``train-all``."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from export.errors import ExportError
from export.paths import BUILD
from export.training.config import (
    ADVERSARIAL,
    FIELDS,
    INIT_LR,
    Config,
    default_of,
    kind_of,
    make_config,
    read_recipe,
)

if TYPE_CHECKING:
    from export.data.clips import Clip

log = logging.getLogger(__name__)

OF_PRUNING = ("prune_to", "sparsity")
NOT_OF_PRUNING = (
    "widths", "objective", "init", "teacher", "optimizer", "pixel_loss", "teacher_weight", "feature_weight",
    "augmented_teacher", "temporal_weight", "perceptual_weight", "adversarial_weight", "discriminator_lr",
)  # fmt: skip
OF_STAGES = ("widths", "objective", "init", "teacher", "prune_to", "minutes")
"""Settings that ``train-all`` takes from the stages of its recipe alone."""

Command = Callable[..., None]

# Commands import what they need when they run, so that --help needs no torch.


def _decorated(command: Command, options: list[Callable[[Command], Command]]) -> Command:
    return reduce(lambda wrapped, option: option(wrapped), reversed(options), command)


def _settings(*left_out: str) -> Callable[[Command], Command]:
    """An option for every field of ``Config``; None where it was not given."""

    def option(name: str) -> Callable[[Command], Command]:
        kind, _ = kind_of(name)
        meta, flag = FIELDS[name].metadata, f"--{name.replace('_', '-')}"
        default = "on a GPU" if name == "bf16" else str(default_of(name)).lower()
        if name == "lr":
            default += f"; with init {INIT_LR:g}"
        if name in ADVERSARIAL:
            default += f"; adversarial {ADVERSARIAL[name]}"
        off = "--fp32" if name == "bf16" else f"--no-{name.replace('_', '-')}"
        return click.option(
            f"{flag}/{off}" if kind is bool else flag, name,
            type=click.Choice(meta["choices"]) if meta["choices"] else kind,
            default=None, show_default=False, help=f"{meta['help']}  [recipe's, or {default}]",
        )  # fmt: skip

    def decorate(command: Command) -> Command:
        return _decorated(command, [option(name) for name in FIELDS if name not in left_out])

    return decorate


def _footage_options(command: Command) -> Command:
    """Where clips, photos and the list of validation clips are."""
    path = click.Path(path_type=Path)
    return _decorated(command, [
        click.option("--recipe", help="Settings: a name of export/training/recipes, or a TOML file."),
        click.option("--clips", type=path, required=True, help="Folder of videos and image sequences."),
        click.option("--photos", type=path, help="Folder of photos, over which a virtual camera moves."),
        click.option(
            "--validation", type=click.Path(path_type=Path, exists=True), required=True,
            help="Text file with the names of the clips to validate on and not to train on, one a line.",
        ),
        click.option("--cache", type=path, default=BUILD / "footage", help="Decoded clips."),
    ])  # fmt: skip


def _network_options(required: bool) -> Callable[[Command], Command]:
    """Weights of the networks of the perceptual loss and of LPIPS."""

    def decorate(command: Command) -> Command:
        path = click.Path(path_type=Path)
        return _decorated(command, [
            click.option(
                "--perceptual", type=path, required=required,
                help="Weights of VGG19 distilled to a sixteenth, for the perceptual loss (adversarial).",
            ),
            click.option(
                "--weights", type=path, required=required,
                help="Folder with the weights of LPIPS (squeeze v0.1), which chooses the best checkpoint.",
            ),
        ])  # fmt: skip

    return decorate


def _configure(recipe: str | None, settings: dict[str, Any], **fixed: object) -> Config:
    """The recipe, overridden by what was given on the command line, checked."""
    from export.network import WIDTHS

    given = {name: value for name, value in settings.items() if value is not None}
    of_recipe = read_recipe(recipe) if recipe else {}
    if "stages" in of_recipe:
        raise ExportError(f"expected a recipe of one run, found stages in {recipe!r}; use train-all")
    source = f"recipe {recipe} and the command line" if recipe else "the command line"
    config = make_config({"bf16": _has_gpu()}, of_recipe, given, fixed, source=source)
    for option, widths in (("--widths", config.widths), ("--prune-to", config.prune_to)):
        if widths is not None and widths not in WIDTHS:
            raise ExportError(f"expected {option} to be one of {', '.join(WIDTHS)}, found {widths!r}")
    _require_multiple(config.patch)
    return config


def _require_multiple(patch: int) -> None:
    from export.spec import MULTIPLE_OF, SCALE

    if patch % (SCALE * MULTIPLE_OF):
        raise ExportError(f"expected --patch to be a multiple of {SCALE * MULTIPLE_OF}, found {patch}")


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _load_footage(
    clips: Path, photos: Path | None, line_art: int, validation: Path, cache: Path, patch: int
) -> tuple[list[Clip], list[Clip], list[Clip]]:
    """Clips and photos of at least ``patch`` pixels a side to train on, and the validation clips."""
    from export.data.clips import load_folder
    from export.data.line_art import draw_all
    from export.metrics.collage import CROP

    names = validation.read_text().split()
    # A larger patch must not leave fewer to score on: runs would not compare.
    validation_clips = load_folder(clips, cache, min_side=min(patch, max(CROP) + 1), names=names)
    training = [clip for clip in load_folder(clips, cache, min_side=patch) if clip.name not in names]
    photo_clips = load_folder(photos, cache, min_side=patch, photo=True) if photos else []
    return training, [*photo_clips, *draw_all(line_art, cache, len(photo_clips))], validation_clips


@click.command()
@_footage_options
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Run folder; an existing run is resumed."
)
@_network_options(required=False)
@_settings(*OF_PRUNING)
def train(
    recipe: str | None, clips: Path, photos: Path | None, validation: Path, cache: Path, out: Path,
    perceptual: Path | None, weights: Path | None, **settings: Any,
) -> None:  # fmt: skip
    """Train one network. Ctrl-C saves; run the same command again to resume.

    An adversarial run keeps, as best.safetensors, the lowest LPIPS among those that lose at most 1 dB of
    PSNR-Y and whose tOF is at most 5 % worse than at its start.
    """
    from export.checkpoint import load_checkpoint
    from export.metrics.lpips import NAME, load_lpips
    from export.training.evaluate import MetricConfig
    from export.training.perceptual import load_distilled_vgg
    from export.training.trainer import STATE_FILE, Trainer

    config = _configure(recipe, settings)
    if config.objective == "adversarial":
        if not (config.init or (out / STATE_FILE).exists()):
            raise ExportError(
                "expected --init with --objective adversarial, found none; train fidelity first"
            )
        if not weights:
            raise ExportError(
                f"expected --weights FOLDER, the weights of {NAME}, found none: it chooses the best "
                "checkpoint of an adversarial run"
            )
        if not perceptual and config.perceptual_weight:
            raise ExportError(
                "expected --perceptual FILE with --objective adversarial, found none; pass it, or "
                "--perceptual-weight 0 to train without a perceptual loss"
            )
        if not config.perceptual_weight:
            log.warning("the perceptual loss is left out: its weight is zero")
    elif perceptual or weights:
        raise ExportError(
            "expected --perceptual and --weights with --objective adversarial alone, found "
            f"{config.objective!r}; drop them"
        )
    distance = load_distilled_vgg(perceptual) if perceptual and config.perceptual_weight else None
    metrics = MetricConfig(load_lpips(weights), tof=True) if weights else None
    footage = _load_footage(clips, photos, config.line_art, validation, cache, config.patch)
    start = load_checkpoint(Path(config.init)) if config.init else None
    teacher = load_checkpoint(Path(config.teacher)) if config.teacher else None
    Trainer(config, *footage, out, start, teacher, perceptual=distance, metrics=metrics).run()


@click.command()
@_footage_options
@click.option("--checkpoint", type=click.Path(path_type=Path), required=True, help="The unpruned network.")
@click.option(
    "--out", type=click.Path(path_type=Path), required=True,
    help="Checkpoint to write, .safetensors; the run folder beside it has its stem, and is resumed.",
)  # fmt: skip
@_settings(*NOT_OF_PRUNING)
def prune(
    recipe: str | None, clips: Path, photos: Path | None, validation: Path, cache: Path, checkpoint: Path,
    out: Path, **settings: Any,
) -> None:  # fmt: skip
    """Remove the least important channels of a trained network. Ctrl-C saves; the same command resumes."""
    from export.checkpoint import load_checkpoint
    from export.network import WIDTHS
    from export.training.prune import SparseTrainer, find_groups, finish

    if out.suffix != ".safetensors":
        raise ExportError(f"expected --out to end in .safetensors, found {out.name!r}")
    network = load_checkpoint(checkpoint)
    config = _configure(recipe or "prune", settings, widths=network.widths.name)
    if not config.prune_to:
        raise ExportError("expected a width table to prune to, found none; pass --prune-to")
    groups = find_groups(network.widths, WIDTHS[config.prune_to])
    footage = _load_footage(clips, photos, config.line_art, validation, cache, config.patch)
    trainer = SparseTrainer(groups, config, *footage, out.with_suffix(""), network)
    trainer.run()
    click.echo(finish(trainer, WIDTHS[config.prune_to], out))


@click.command()
@_footage_options
@_network_options(required=True)
@click.option(
    "--out", type=click.Path(path_type=Path), required=True,
    help="Folder of all runs and of the checkpoints; an existing one is resumed.",
)  # fmt: skip
@click.option(
    "--minutes", type=click.FloatRange(min=0, min_open=True), default=28.0,
    help="Wall time of all stages, resumed parts together.",
)  # fmt: skip
@_settings(*OF_STAGES)
def train_all(
    recipe: str | None, clips: Path, photos: Path | None, validation: Path, cache: Path, perceptual: Path,
    weights: Path, out: Path, minutes: float, **settings: Any,
) -> None:  # fmt: skip
    """Train every checkpoint within a budget of time: baseline, pruned, perceptual, compact, student.

    Ctrl-C saves; the same command resumes. The recipe has the stages, their shares of the time and their
    settings; by default it is export/training/recipes/all.toml. Settings given here hold for all stages that
    do not set them.
    """
    from export.metrics.lpips import load_lpips
    from export.training.evaluate import MetricConfig
    from export.training.perceptual import load_distilled_vgg
    from export.training.train_all import Footage, read_stages
    from export.training.train_all import train_all as run_stages

    recipe = recipe or "all"
    given = {name: value for name, value in settings.items() if value is not None}
    stages = read_stages({"bf16": _has_gpu(), **read_recipe(recipe)}, given, f"recipe {recipe}")
    first = stages[0].config
    _require_multiple(first.patch)
    # All of it before the first stage: a fault here must not cost what stages before it took.
    distance, lpips = load_distilled_vgg(perceptual), load_lpips(weights)
    footage = Footage(*_load_footage(clips, photos, first.line_art, validation, cache, first.patch))
    metrics = MetricConfig(lpips, tof=True)
    for path in run_stages(stages, minutes, footage, out, distance, metrics):
        click.echo(path)
