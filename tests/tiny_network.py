"""Networks of the real shapes and next to no width, for tests that run or export them."""

from pathlib import Path

import torch
from click.testing import CliRunner, Result

from export import spec
from export.__main__ import main
from export.data.degradations import bi
from export.network import MstGan, PyramidWidths, Widths

TINY = PyramidWidths(
    name="tiny",
    encoder_inner=(8, 8, 8, 8),
    context_inner=8,
    body_inner=(8,),
    up=8,
    encoder_outer=(16, 16, 16, 16),
    encoder_depths=(1, 1, 1, 1),
    laterals=(16, 16, 16, 16),
    body=16,
    context_blocks=1,
)

LIGHT = Widths(name="light", body=16, body_inner=(8,))


def random_window(batch: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(
        0, 256, (batch, spec.WINDOW, height, width, 3), dtype=torch.uint8, generator=generator
    )


def frames_of(windows: int) -> torch.Tensor:
    """(windows, 3, 3, 32, 32), 0..1: noise, as training shows frames to a network."""
    noise = torch.Generator().manual_seed(0)
    return bi(torch.rand(windows, spec.WINDOW, 3, 128, 128, generator=noise))


def shake(network: MstGan) -> MstGan:
    """Give every zero-initialised layer weights, so that no path is silent."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    return network.eval()


def run_build(checkpoint: Path, folder: Path, *options: str) -> Result:
    """Run the build command into a folder; without speed gate, for so small a network gains nothing."""
    paths = ["--checkpoint", checkpoint, "--repository", folder / "models", "--build", folder / "build"]
    return CliRunner().invoke(main, ["build", *map(str, paths), "--no-speed-gate", *options])
