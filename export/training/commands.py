"""Commands of the training part: ``python -m export train``, ``prune``, ``train-all`` and ``evaluate``."""

from __future__ import annotations

import json
import logging
import signal
from collections.abc import Callable
from datetime import date
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING

import click

from export.errors import ExportError
from export.folders import BUILD

if TYPE_CHECKING:
    from export.data.clips import Clip

log = logging.getLogger(__name__)

OBJECTIVES = ("fidelity", "adversarial")
PIXEL_LOSS_NAMES = ("charbonnier", "mixed", "squared", "luma")

# They import what they need when they run, so that --help needs no torch.


def _footage_options(command: Callable[..., None]) -> Callable[..., None]:
    """What every training command asks for: footage, and how it is drawn and computed on."""
    options = (
        click.option("--clips", type=click.Path(path_type=Path), required=True, help="Folder of footage."),
        click.option(
            "--photos",
            type=click.Path(path_type=Path),
            help="Folder of still images, to be moved synthetically.",
        ),
        click.option(
            "--validation", type=click.Path(path_type=Path, exists=True), required=True,
            help="Text file naming the clips to hold back and score on, one a line.",
        ),
        click.option(
            "--cache", type=click.Path(path_type=Path), default=BUILD / "footage", help="Decoded footage."
        ),
        click.option(
            "--drawings", default=2048, help="So many drawings of lines, letters and shapes, as photos."
        ),
        click.option("--photo-share", default=0.4, help="Of the windows, taken from photos and drawings."),
        click.option("--seed", default=0),
        click.option(
            "--compile/--no-compile", "compiled", default=False, help="By torch.compile: slower to start."
        ),
        click.option("--hold/--no-hold", default=True, help="All footage in the GPU's memory."),
    )  # fmt: skip
    return reduce(lambda wrapped, option: option(wrapped), reversed(options), command)


def _run_options(command: Callable[..., None]) -> Callable[..., None]:
    """What a command asks for that trains one network."""
    options = (
        click.option("--batch", default=12, help="Windows per step."),
        click.option("--patch", default=192, help="Hr pixels a side."),
        click.option("--warmup", default=500, help="Steps over which the learning rate rises."),
        click.option(
            "--bf16/--fp32", default=None,
            help="Arithmetic of convolutions; by default bf16 on a GPU.", show_default=False,
        ),
        click.option(
            "--validate-every", default=1000, help="Steps between validations; each also saves."
        ),
    )  # fmt: skip
    return reduce(lambda wrapped, option: option(wrapped), reversed(options), command)


def _prepare(patch: int, widths: str | None = None) -> None:
    """Check what the training commands share, and let a stopped run save."""
    from export.network import WIDTHS
    from export.spec import MULTIPLE_OF, SCALE

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as with Ctrl-C
    if widths is not None and widths not in WIDTHS:
        raise ExportError(f"expected --widths to be one of {', '.join(WIDTHS)}, found {widths!r}")
    if patch % (SCALE * MULTIPLE_OF):
        raise ExportError(f"expected --patch to be a multiple of {SCALE * MULTIPLE_OF}, found {patch}")


def _load_footage(
    clips: Path, photos: Path | None, drawings: int, validation: Path, cache: Path, patch: int
) -> tuple[list[Clip], list[Clip], list[Clip]]:
    """Clips and stills of at least ``patch`` pixels a side to train on, and the clips held back."""
    from export.data.clips import load_folder
    from export.data.line_art import draw_all
    from export.metrics.collage import CROP

    names = validation.read_text().split()
    # A larger patch must not leave fewer to score on: runs would not compare, nor with ``evaluate``.
    held_back = load_folder(clips, cache, min_side=min(patch, max(CROP) + 1), names=names)
    training = [clip for clip in load_folder(clips, cache, min_side=patch) if clip.name not in names]
    stills = load_folder(photos, cache, min_side=patch, photo=True) if photos else []
    return training, [*stills, *draw_all(drawings, cache, len(stills))], held_back


@click.command()
@_footage_options
@_run_options
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Run folder; an existing one is resumed."
)
@click.option(
    "--init", type=click.Path(path_type=Path), help="Checkpoint to start from, of these widths or smaller."
)
@click.option(
    "--objective", type=click.Choice(OBJECTIVES), default="fidelity",
    help="adversarial: against a discriminator, after fidelity.",
)  # fmt: skip
@click.option(
    "--teacher", "teachers", type=click.Path(path_type=Path), multiple=True,
    help="Checkpoint, or single-image network (.pt2), whose answers are learned too; of several their mean.",
)  # fmt: skip
@click.option("--teacher-weight", default=1.0, help="Of the distance to the teachers' answer.")
@click.option("--hint-weight", default=0.01, help="Of its features, within the teacher's weight.")
@click.option(
    "--turned-teacher", is_flag=True, help="It sees windows turned at random; its features are not learned."
)
@click.option(
    "--pixel-loss", type=click.Choice(PIXEL_LOSS_NAMES), show_default="mixed; adversarial: charbonnier",
    help="Between an answer and the truth, or the teacher's answer.",
)  # fmt: skip
@click.option(
    "--temporal-weight", type=float, show_default="0; adversarial: 5",
    help="Of flicker between consecutive answers.",
)  # fmt: skip
@click.option(
    "--perceptual", type=click.Path(path_type=Path),
    help="Weights of VGG19 distilled to a sixteenth, for the perceptual loss of --objective adversarial.",
)  # fmt: skip
@click.option("--perceptual-weight", default=20.0, help="Of the perceptual loss.")
@click.option("--adversarial-weight", default=0.01, help="Of the discriminator's score.")
@click.option("--discriminator-lr", default=1.0, help="Its learning rate over that of the generator.")
@click.option(
    "--weights", type=click.Path(path_type=Path),
    help="Folder with the weights of LPIPS (squeeze v0.1), by which an adversarial run is judged.",
)  # fmt: skip
@click.option("--widths", default="pruned", help="Width table.")
@click.option("--steps", default=20_000)
@click.option(
    "--minutes", type=click.FloatRange(min=0, min_open=True),
    help="Wall time the run may take, resumed parts together; ends it before --steps.",
)  # fmt: skip
@click.option(
    "--lr", type=float, show_default="2e-3; with --init 4e-4; adversarial: 3e-4", help="Peak learning rate."
)
@click.option(
    "--decay-share", type=click.FloatRange(0, 1, min_open=True), default=0.4,
    help="Of the run, its last: the learning rate falls.",
)  # fmt: skip
def train(
    clips: Path, photos: Path | None, validation: Path, out: Path, cache: Path, init: Path | None,
    objective: str, teachers: tuple[Path, ...], teacher_weight: float, hint_weight: float,
    turned_teacher: bool, pixel_loss: str | None, temporal_weight: float | None,
    perceptual: Path | None, perceptual_weight: float, adversarial_weight: float, discriminator_lr: float,
    weights: Path | None, drawings: int, photo_share: float, widths: str, steps: int,
    minutes: float | None, batch: int, patch: int, lr: float | None, decay_share: float, warmup: int,
    seed: int, bf16: bool | None, compiled: bool, hold: bool, validate_every: int,
) -> None:  # fmt: skip
    """Train for fidelity, a teacher, or against a discriminator; Ctrl-C saves, the same command goes on.

    An adversarial run keeps, as best.safetensors, the lowest LPIPS among those that lose at most 1 dB of
    PSNR-Y and whose tOF is at most 5 % worse than at its start.
    """
    import torch

    from export.checkpoint import load_checkpoint
    from export.metrics.lpips import NAME, load_lpips
    from export.training.evaluation import Instruments
    from export.training.imitation import load_teacher
    from export.training.options import OPTIMIZER_OF, PIXEL_LOSS_OF, TEMPORAL_WEIGHT_OF, default_lr
    from export.training.perceptual import load_distilled_vgg
    from export.training.trainer import STATE_FILE, Trainer, TrainOptions

    _prepare(patch, widths)
    if objective == "adversarial":
        if not (init or (out / STATE_FILE).exists()):
            raise ExportError(
                "expected --init with --objective adversarial, found none; train fidelity first"
            )
        if not weights:
            raise ExportError(
                f"expected --weights FOLDER, the weights of {NAME}, found none: an adversarial run is judged "
                "by it"
            )
        if not perceptual and perceptual_weight:
            raise ExportError(
                "expected --perceptual FILE with --objective adversarial, found none; pass it, or "
                "--perceptual-weight 0 to train without a perceptual loss"
            )
        if not perceptual_weight:
            log.warning("the perceptual loss is left out: its weight is zero")
    elif perceptual or weights:
        raise ExportError(
            f"expected --perceptual and --weights with --objective adversarial alone, found {objective!r}; "
            "drop them"
        )
    distance = load_distilled_vgg(perceptual) if perceptual and perceptual_weight else None
    instruments = Instruments(load_lpips(weights), flicker=True) if weights else None
    options = TrainOptions(
        objective=objective, optimizer=OPTIMIZER_OF[objective],
        pixel_loss=pixel_loss or PIXEL_LOSS_OF[objective],
        teacher_weight=teacher_weight, hint_weight=hint_weight, turned_teacher=turned_teacher,
        temporal_weight=TEMPORAL_WEIGHT_OF[objective] if temporal_weight is None else temporal_weight,
        perceptual_weight=perceptual_weight, adversarial_weight=adversarial_weight,
        discriminator_lr=discriminator_lr,
        photo_share=photo_share, widths=widths, steps=steps,
        minutes=minutes, batch=batch, patch=patch,
        lr=default_lr(objective, fresh=not init) if lr is None else lr, decay_share=decay_share,
        warmup=warmup, seed=seed,
        bf16=torch.cuda.is_available() if bf16 is None else bf16, compile=compiled, hold=hold,
        validate_every=validate_every,
    )  # fmt: skip
    footage = _load_footage(clips, photos, drawings, validation, cache, patch)
    start = load_checkpoint(init) if init else None
    masters = [load_teacher(path) for path in teachers]
    Trainer(
        options, *footage, out, start, masters, perceptual=distance, instruments=instruments
    ).run()  # fmt: skip


@click.command()
@_footage_options
@_run_options
@click.option("--checkpoint", type=click.Path(path_type=Path), required=True, help="The unpruned network.")
@click.option(
    "--out", type=click.Path(path_type=Path), required=True,
    help="Checkpoint to write, .safetensors; the run folder beside it has its stem, and is resumed.",
)  # fmt: skip
@click.option("--widths", default="pruned", help="Width table to prune to.")
@click.option("--steps", default=2000, help="Under the penalty, before channels go.")
@click.option(
    "--minutes", type=click.FloatRange(min=0, min_open=True),
    help="Wall time these steps may take, resumed parts together; ends them before --steps.",
)  # fmt: skip
@click.option(
    "--sparsity", default=0.1, help="What the penalty takes from a channel's RMS per step, over --lr."
)
@click.option("--lr", default=1e-4, help="Peak learning rate.")
def prune(
    checkpoint: Path, clips: Path, photos: Path | None, validation: Path, out: Path, cache: Path,
    widths: str, steps: int, minutes: float | None, sparsity: float, drawings: int, photo_share: float,
    batch: int, patch: int, lr: float, warmup: int, seed: int, bf16: bool | None, compiled: bool, hold: bool,
    validate_every: int,
) -> None:  # fmt: skip
    """Take the least important channels out of a trained network; Ctrl-C saves, the same command goes on."""
    import torch

    from export.checkpoint import load_checkpoint
    from export.network import WIDTHS
    from export.training.prune import SparseTrainer, find_groups, finish
    from export.training.trainer import TrainOptions

    _prepare(patch, widths)
    if out.suffix != ".safetensors":
        raise ExportError(f"expected --out to end in .safetensors, found {out.name!r}")
    if steps < 1 or sparsity < 0:
        raise ExportError(
            f"expected --steps of at least 1 and --sparsity of at least 0, found {steps} and {sparsity}"
        )
    network = load_checkpoint(checkpoint)
    groups = find_groups(network.widths, WIDTHS[widths])
    options = TrainOptions(
        optimizer="adam", photo_share=photo_share, widths=network.widths.name, steps=steps,
        minutes=minutes, batch=batch, patch=patch, lr=lr, warmup=warmup, seed=seed,
        bf16=torch.cuda.is_available() if bf16 is None else bf16, compile=compiled, hold=hold,
        validate_every=validate_every,
    )  # fmt: skip
    footage = _load_footage(clips, photos, drawings, validation, cache, patch)
    trainer = SparseTrainer(
        groups, sparsity, options, *footage, out.with_suffix(""), network,
    )  # fmt: skip
    trainer.run()
    click.echo(finish(trainer, WIDTHS[widths], out))


@click.command()
@_footage_options
@click.option(
    "--perceptual", type=click.Path(path_type=Path), required=True,
    help="Weights of VGG19 distilled to a sixteenth, for the perceptual loss.",
)  # fmt: skip
@click.option(
    "--weights", type=click.Path(path_type=Path), required=True,
    help="Folder with the weights of LPIPS (squeeze v0.1), by which checkpoints are judged.",
)  # fmt: skip
@click.option(
    "--out", type=click.Path(path_type=Path), required=True,
    help="Folder of all runs and of the checkpoints; an existing one is resumed.",
)  # fmt: skip
@click.option(
    "--minutes", type=click.FloatRange(min=0, min_open=True), default=28.0,
    help="Wall time of all stages, resumed parts together.",
)  # fmt: skip
@click.option(
    "--teacher", "teachers", type=click.Path(path_type=Path), multiple=True,
    help="Single-image network (.pt2) that teaches all but the perceptual stage, beside the recipe's own.",
)  # fmt: skip
@click.option("--steps", default=10_000_000, help="At most, per stage: for a trial.", show_default=False)
@click.option("--batch", default=32, help="Windows per step.")
@click.option("--patch", default=256, help="Hr pixels a side.")
def train_all(
    clips: Path, photos: Path | None, validation: Path, perceptual: Path, weights: Path, out: Path,
    cache: Path, minutes: float, teachers: tuple[Path, ...], steps: int, drawings: int, photo_share: float,
    batch: int, patch: int, seed: int, compiled: bool, hold: bool,
) -> None:  # fmt: skip
    """Train every checkpoint within a budget of time: baseline, pruned, perceptual, compact, student.

    Ctrl-C saves, the same command goes on. export/training/recipe.py has the stages and their shares.
    """
    from export.metrics.lpips import load_lpips
    from export.training.evaluation import Instruments
    from export.training.imitation import load_teacher
    from export.training.options import TrainOptions
    from export.training.perceptual import load_distilled_vgg
    from export.training.recipe import Footage
    from export.training.recipe import train_all as run_stages

    _prepare(patch)
    # All of it before the first stage: a fault here must not cost what stages before it took.
    distance, judge = load_distilled_vgg(perceptual), load_lpips(weights)
    masters = [load_teacher(path) for path in teachers]
    footage = Footage(*_load_footage(clips, photos, drawings, validation, cache, patch))
    options = TrainOptions(
        steps=steps, photo_share=photo_share, batch=batch, patch=patch, seed=seed, compile=compiled, hold=hold
    )
    instruments = Instruments(judge, flicker=True)
    for path in run_stages(options, minutes, footage, out, distance, instruments, masters):
        click.echo(path)


@click.command()
@click.option("--clips", type=click.Path(path_type=Path), required=True, help="Folder of footage.")
@click.option(
    "--validation", type=click.Path(path_type=Path, exists=True), required=True,
    help="Text file naming the clips, one a line.",
)  # fmt: skip
@click.option(
    "--checkpoint", "checkpoints", type=click.Path(path_type=Path), multiple=True,
    help="Weights; repeat it to compare several. By default the project's own.",
)  # fmt: skip
@click.option("--segments", default=4, help="Per clip, of seven frames each, evenly spread.")
@click.option("--degradation", default="bi", help="How lr frames are made: bi, bd or real.")
@click.option(
    "--weights", type=click.Path(path_type=Path), help="Folder with the weights of LPIPS (squeeze v0.1)."
)
@click.option("--tof/--no-tof", default=True, help="Flicker, tOF: slow.")
@click.option("--vmaf/--no-vmaf", default=True, help="VMAF.")
@click.option(
    "--log", "logs", type=click.Path(path_type=Path), multiple=True,
    help="log.csv of a training run, to be drawn as curves.",
)  # fmt: skip
@click.option("--cache", type=click.Path(path_type=Path), default=BUILD / "footage", help="Decoded footage.")
@click.option(
    "--out", type=click.Path(path_type=Path), default=BUILD / "evaluation", help="Tables and pictures."
)
def evaluate(
    clips: Path, validation: Path, checkpoints: tuple[Path, ...], segments: int, degradation: str,
    weights: Path | None, tof: bool, vmaf: bool, logs: tuple[Path, ...], cache: Path, out: Path,
) -> None:  # fmt: skip
    """Score checkpoints beside bicubic: tables, their JSON, a picture per clip, and training curves."""
    import torch
    from rich.progress import Progress

    from export.checkpoint import DEFAULT, load_checkpoint
    from export.data.clips import load_folder
    from export.metrics.collage import CROP
    from export.metrics.lpips import NAME, load_lpips
    from export.metrics.vmaf import PACKAGE, has_vmaf
    from export.training import evaluation
    from export.training.curves import draw_curves
    from export.training.device import find_device
    from export.training.tables import markdown

    if segments < 1:
        raise ExportError(f"expected --segments of at least 1, found {segments}")
    device = find_device()
    paths = checkpoints or (DEFAULT,)
    names = [path.stem for path in paths]
    if len(set(names)) < len(names):
        names = [f"{path.parent.name}/{path.stem}" for path in paths]
    networks = {name: load_checkpoint(path).to(device) for name, path in zip(names, paths, strict=True)}
    if len(networks) < len(paths):
        raise ExportError(f"expected checkpoints of different names, found {', '.join(names)}; rename one")
    if not weights:
        log.warning("%s is left out: pass --weights FOLDER to measure it", NAME)
    if vmaf and not has_vmaf():
        log.warning("VMAF is left out: it needs the package %s (pip install -e .[evaluate])", PACKAGE)
    instruments = evaluation.Instruments(
        load_lpips(weights).to(device) if weights else None, tof, vmaf and has_vmaf()
    )
    footage = load_folder(clips, cache, min_side=max(CROP) + 1, names=validation.read_text().split())
    out.mkdir(parents=True, exist_ok=True)
    with Progress() as progress:
        total = sum(len(evaluation.chosen_segments(clip, segments)) for clip in footage)
        task = progress.add_task("scoring", total=total)
        scores = evaluation.evaluate_all(
            networks, footage, segments, instruments,
            degradation=degradation, on_segment=lambda: progress.advance(task),
        )  # fmt: skip
        for clip in progress.track(footage, description="drawing"):
            evaluation.illustrate(networks, clip, out / f"{Path(clip.name).stem}.png", degradation)
    tables = markdown(scores)
    conditions = {
        "date": date.today().isoformat(), "degradation": degradation, "segments": segments,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
    }  # fmt: skip
    (out / "scores.md").write_text(tables + "\n")
    report = {**conditions, "scores": evaluation.as_json(scores)}
    (out / "scores.json").write_text(json.dumps(report, indent=2) + "\n")
    if logs:
        draw_curves(logs, out / "curves.png")
    click.echo(tables)
