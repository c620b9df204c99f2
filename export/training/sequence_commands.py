"""``python -m export train-sequences`` and ``evaluate-stream``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from export.paths import BUILD

# Commands import what they need when they run, so that --help needs no torch.

_PATH = click.Path(path_type=Path)
_FILE = click.Path(path_type=Path, exists=True)


def _from_recipe(context: click.Context, _: click.Parameter, name: str | None) -> None:
    """Make a recipe's settings the defaults of all options."""
    if name is None:
        return
    from export.errors import ExportError
    from export.training.config import read_recipe

    recipe = read_recipe(name).get("sequences")
    if recipe is None:
        raise ExportError(
            f"expected a table [sequences] in the recipe {name}, found none; is it one of `train`?"
        )
    known = {parameter.name for parameter in context.command.params}
    if unknown := set(recipe) - known:
        raise ExportError(
            f"expected settings of train-sequences in {name}, found {', '.join(sorted(unknown))}"
        )
    context.default_map = recipe


@click.command("train-sequences")
@click.option(
    "--recipe", callback=_from_recipe, is_eager=True, expose_value=False,
    help="Settings: a name of export/training/recipes, or a TOML file.",
)  # fmt: skip
@click.option("--clips", type=_FILE, required=True, help="Folder of videos.")
@click.option("--photos", type=_FILE, required=True, help="Folder of photos, over which a camera moves.")
@click.option("--validation", type=_FILE, required=True, help="Text file with names of clips to leave out.")
@click.option("--cache", type=_PATH, default=BUILD / "sequences", help="Decoded footage, some 10 GB.")
@click.option("--init", type=_PATH, help="Window network whose weights the run starts from.")
@click.option("--out", type=_PATH, required=True, help="Run folder; an existing run is resumed.")
@click.option("--until", type=float, default=5e9, help="Lr pixels to train on.")
@click.option(
    "--widths", default="stream", help="Width table, of a recurrent network or of a window network."
)
@click.option("--line-art", type=int, default=400, help="Synthetic drawings, used as photos.")
@click.option("--batch", type=int, default=2, help="Sequences per step.")
@click.option("--lr", type=float, default=5e-4, help="Learning rate.")
@click.option("--decay-share", type=float, default=0.0, help="Share of the run in which it falls to nothing.")
@click.option("--kept", default="all", help="What of the state is kept: all, features, detail or none.")
@click.option(
    "--variants", type=int, default=0,
    help="Variants of every scene as cameras and codecs make it; 0: reduced by bicubic alone.",
)  # fmt: skip
@click.option("--rendered", type=int, default=240, help="Sequences rendered from photos.")
@click.option("--seed", type=int, default=0, help="Seed of the batches.")
@click.option("--save-every", type=float, default=180.0, help="Seconds between checkpoints.")
def train_sequences(
    clips: Path, photos: Path, validation: Path, cache: Path, init: Path | None, out: Path, until: float,
    widths: str, line_art: int, batch: int, lr: float, decay_share: float, kept: str, variants: int,
    rendered: int, seed: int, save_every: float,
) -> None:  # fmt: skip
    """Train a recurrent or a window network on sequences. Ctrl-C saves; the same command again resumes."""
    from export.checkpoint import load_checkpoint
    from export.data.degraded import degrade_scenes, render_photos
    from export.data.line_art import draw_all
    from export.data.sequences import SequenceSampler, build_cache, load_photos, load_scenes, share_scenes
    from export.errors import ExportError
    from export.network import WIDTHS, MstGan
    from export.network.stream import STREAM_WIDTHS, StreamNetwork, from_window_network
    from export.training.sequence_trainer import GROUPS, KEPT, SequenceOptions, SequenceTrainer

    for option, value, allowed in (("widths", widths, {**STREAM_WIDTHS, **WIDTHS}), ("kept", kept, KEPT)):
        if value not in allowed:
            raise ExportError(f"expected --{option} to be one of {', '.join(allowed)}, found {value!r}")
    build_cache(clips, cache / "clips", validation.read_text().split())
    drawings = [clip.segments[0, 0] for clip in draw_all(line_art, cache)]
    stills = load_photos(photos, cache / "photos")
    render_photos(stills, drawings, cache / "rendered", rendered)
    for kind in ("clips", "rendered"):
        degrade_scenes(cache / kind, cache / f"{kind}-lr", variants)
    footage = load_scenes(cache / "clips", cache / "clips-lr", GROUPS, variants)
    moving = load_scenes(cache / "rendered", cache / "rendered-lr", {}, variants)
    sampler = SequenceSampler(share_scenes(footage, moving), seed=seed)
    window = load_checkpoint(init) if init else None
    start: StreamNetwork | MstGan | None = window
    if window and widths in STREAM_WIDTHS:
        start = from_window_network(window.generator, STREAM_WIDTHS[widths])
    options = SequenceOptions(
        widths=widths, batch=batch, lr=lr, until=int(until), decay_share=decay_share, kept=kept, seed=seed
    )
    SequenceTrainer(options, sampler, out, start).run(save_every)


@click.command("evaluate-stream")
@click.option("--clips", type=_FILE, required=True, help="Folder of videos.")
@click.option("--names", type=_FILE, help="Text file with the names of the clips to score; by default all.")
@click.option("--cache", type=_PATH, default=BUILD / "footage", help="Decoded clips.")
@click.option("--checkpoint", type=_PATH, required=True, help="Weights of a recurrent network.")
@click.option("--window", type=_PATH, help="Window network to compare with.")
@click.option("--frames", type=int, default=100, help="At most so many of each clip, up to its first cut.")
def evaluate_stream(
    clips: Path, names: Path | None, cache: Path, checkpoint: Path, window: Path | None, frames: int
) -> None:
    """Print gains in PSNR-Y over bicubic as JSON, by clip and by how many frames came before."""
    from export.checkpoint import load_checkpoint, load_stream_checkpoint
    from export.data.evaluation_clips import find_sources
    from export.network import MstGan
    from export.network.stream import StreamNetwork
    from export.training.stream_evaluation import by_age, first_scene, mean_by_age, psnr_by_frame

    networks: dict[str, StreamNetwork | MstGan] = {"stream": load_stream_checkpoint(checkpoint)}
    if window:
        networks["window"] = load_checkpoint(window)
    gains: dict[str, dict[str, dict[str, float]]] = {name: {} for name in networks}
    for source in find_sources(clips, names=names.read_text().split() if names else None):
        scene = first_scene(source, cache, frames)
        bicubic = psnr_by_frame(None, scene)
        for name, network in networks.items():
            gains[name][source.name] = by_age(psnr_by_frame(network, scene) - bicubic)
    for rows in gains.values():
        rows["mean"] = mean_by_age(list(rows.values()))
    click.echo(json.dumps(gains, indent=1))
