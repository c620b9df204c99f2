"""Every residual block of every committed checkpoint changes the picture visibly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from export.checkpoint import FOLDER, load_checkpoint
from export.data.sample import reduced_windows
from export.network import MstGan
from export.network.encoder import Bottleneck
from export.network.frames import frames_from_window
from export.network.layers import ResidualBlock

pytestmark = pytest.mark.slow

ROUNDING = 0.5  # gray levels: what no byte of the answer shows
SPOT = 110  # of the sample clip

BALLAST = {
    "mst_gan_baseline": {
        "encoder.layer1": 0.024, "encoder.layer2": 0.00082, "encoder.layer3": 0.000050,
        "encoder.layer4": 0.000032, "context": 0.055,
    },
    "mst_gan_pruned": {
        "encoder.layer1": 0.014, "encoder.layer2": 0.00050, "encoder.layer3": 0.000040,
        "encoder.layer4": 0.000023, "context": 0.031,
    },
}  # fmt: skip
"""Blocks that do nothing yet, by checkpoint and layer: RMS change of the frame, in gray levels, without the
layer's most effective block (measured 2026-12-01). A layer that starts to work has to leave this table."""


def changes(network: MstGan) -> dict[str, float]:
    """RMS change of the unrounded frame, in gray levels, without each residual block."""
    lr_window = torch.from_numpy(reduced_windows(SPOT, 1)[0][:, :, 20:52, 64:128])
    generator, found = network.generator, {}
    with torch.inference_mode():
        flow, aligned = network.flow_align(lr_window)
        inputs = (frames_from_window(lr_window), flow, aligned.float() / 255)
        whole = generator.generate(*inputs)
        for name, block in generator.named_modules():
            if not isinstance(block, Bottleneck | ResidualBlock):
                continue
            last = block.expand if isinstance(block, Bottleneck) else block.conv2
            kept = [parameter.clone() for parameter in last.parameters()]
            for parameter in last.parameters():
                parameter.zero_()
            found[name] = float(255 * (generator.generate(*inputs) - whole).square().mean().sqrt())
            for parameter, value in zip(last.parameters(), kept, strict=True):
                parameter.copy_(value)
    return found


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.safetensors")), ids=lambda path: path.stem)
def test_no_block_is_ballast_but_those_known(path: Path) -> None:
    found = changes(load_checkpoint(path))
    assert found
    idle: dict[str, float] = {}
    for name, change in found.items():
        if change < ROUNDING:
            layer = name.rpartition(".")[0]
            idle[layer] = max(change, idle.get(layer, 0.0))
    assert idle == pytest.approx(BALLAST.get(path.stem, {}), rel=0.2)
