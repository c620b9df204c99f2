"""``python -m export average``: the mean of the weights of several runs."""

from __future__ import annotations

import json
from pathlib import Path

import click
from safetensors import SafetensorError

from export.errors import ExportError

# Imports what it needs when it runs, so that --help needs no torch.


@click.command()
@click.argument("checkpoints", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Checkpoint to write.")
def average(checkpoints: tuple[Path, ...], out: Path) -> None:
    """Average the weights of several checkpoints, of runs that began from the same weights.

    Each run ends at a distance from their common optimum, and the mean is often nearer to it (Wortsman et al.
    2022, "model soups"). The mean of runs that began from different weights is useless.
    """
    import torch

    from export.checkpoint import load_checkpoint, save_checkpoint

    if len(checkpoints) < 2:
        raise ExportError(f"expected at least two checkpoints to average, found {len(checkpoints)}")
    networks = [load_checkpoint(path) for path in checkpoints]
    mean = networks[0]
    for path, network in zip(checkpoints, networks, strict=True):
        if network.widths != mean.widths:
            raise ExportError(
                f"expected checkpoints of the same widths, found {mean.widths.name!r} in {checkpoints[0]} "
                f"and {network.widths.name!r} in {path}; average runs of one network"
            )
    states = [network.state_dict() for network in networks]
    mean.load_state_dict({name: torch.stack([s[name] for s in states]).mean(0) for name in states[0]})
    recipe = json.dumps({"average_of": [path.name for path in checkpoints]})
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        save_checkpoint(mean, out, {"recipe": recipe})
    except (OSError, SafetensorError) as err:
        raise ExportError(f"expected to write {out}, found {err}; make room or choose another --out") from err
    click.echo(f"{out}: the mean of {len(checkpoints)} checkpoints of the widths {mean.widths.name!r}")
