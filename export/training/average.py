"""``python -m export average`` and ``interpolate``: weights between those of several runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import click
from safetensors import SafetensorError

from export.errors import ExportError

# Imports what it needs when it runs, so that --help needs no torch.

_OUT = click.option("--out", type=click.Path(path_type=Path), required=True, help="Checkpoint to write.")


@click.command()
@click.argument("checkpoints", type=click.Path(path_type=Path), nargs=-1, required=True)
@_OUT
def average(checkpoints: tuple[Path, ...], out: Path) -> None:
    """Average the weights of several checkpoints, of runs that began from the same weights.

    Each run ends at a distance from their common optimum, and the mean is often nearer to it (Wortsman et al.
    2022, "model soups"). The mean of runs that began from different weights is useless.
    """
    if len(checkpoints) < 2:
        raise ExportError(f"expected at least two checkpoints to average, found {len(checkpoints)}")
    recipe = {"average_of": [path.name for path in checkpoints]}
    _mix(checkpoints, [1 / len(checkpoints)] * len(checkpoints), out, recipe)
    click.echo(f"{out}: the mean of {len(checkpoints)} checkpoints")


@click.command()
@click.argument("first", type=click.Path(path_type=Path))
@click.argument("second", type=click.Path(path_type=Path))
@click.option(
    "--alpha", type=click.FloatRange(0, 1), required=True, help="0: the first's weights, 1: the second's."
)
@_OUT
def interpolate(first: Path, second: Path, alpha: float, out: Path) -> None:
    """Interpolate between the weights of two checkpoints, of which one began from the other.

    The result lies between them in what it does as well (Wang et al. 2019, "deep network interpolation"): how
    strongly it cleans, say, or how much detail it adds.
    """
    recipe = {"interpolation_of": [first.name, second.name], "alpha": alpha}
    _mix((first, second), (1 - alpha, alpha), out, recipe)
    click.echo(f"{out}: {1 - alpha:g} of {first.name} and {alpha:g} of {second.name}")


def _mix(checkpoints: Sequence[Path], shares: Sequence[float], out: Path, recipe: object) -> None:
    """Write the sum of all weights, each times its share."""
    import torch

    from export.checkpoint import load_checkpoint, save_checkpoint

    networks = [load_checkpoint(path) for path in checkpoints]
    mixed = networks[0]
    for path, network in zip(checkpoints, networks, strict=True):
        if network.widths != mixed.widths:
            raise ExportError(
                f"expected checkpoints of the same widths, found {mixed.widths.name!r} in {checkpoints[0]} "
                f"and {network.widths.name!r} in {path}; choose runs of one network"
            )
    states = [network.state_dict() for network in networks]
    mixed.load_state_dict(
        {
            name: torch.stack([s * state[name] for s, state in zip(shares, states, strict=True)]).sum(0)
            for name in states[0]
        }
    )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        save_checkpoint(mixed, out, {"recipe": json.dumps(recipe)})
    except (OSError, SafetensorError) as err:
        raise ExportError(f"expected to write {out}, found {err}; make room or choose another --out") from err
