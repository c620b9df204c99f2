"""Width tables: the numbers that tell the baseline network from its pruned form."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Widths:
    """Channel counts of one MST-GAN generator.

    Pruning narrows the channels *inside* residual blocks and flow levels; what passes between blocks
    keeps its width, so a pruned layer is a slice of the baseline's and no skip connection is cut.
    Widths are multiples of 16, the granule of FP16 tensor cores.
    """

    name: str
    flow: tuple[int, int, int]
    """Hidden channels of each flow level."""
    flow_refine: int
    """Hidden channels of the flow refinement at half resolution."""
    encoder_inner: tuple[int, int, int, int]
    """Bottleneck channels of layer1..layer4 (ResNet-50: 64, 128, 256, 512)."""
    context_inner: int
    """Inner channels of the residual blocks at a quarter of the resolution."""
    detail_inner: int
    """Inner channels of the residual blocks at full resolution."""
    up: int
    """Channels at half resolution, between the two x2 shuffles."""
    encoder_outer: tuple[int, int, int, int] = (256, 512, 1024, 2048)
    encoder_depths: tuple[int, int, int, int] = (3, 4, 6, 3)
    laterals: tuple[int, int, int, int] = (96, 128, 192, 192)
    """Pyramid channels at 1/4, 1/8, 1/16 and 1/32."""
    detail: int = 48
    """Trunk channels at full resolution."""
    context_blocks: int = 6
    detail_blocks: int = 4


BASELINE = Widths(
    name="baseline",
    flow=(32, 64, 32),
    flow_refine=32,
    encoder_inner=(64, 128, 256, 512),
    context_inner=96,
    detail_inner=48,
    up=48,
)

PRUNED = Widths(
    name="pruned",
    flow=(32, 48, 32),
    flow_refine=16,
    encoder_inner=(32, 64, 160, 352),
    context_inner=48,
    detail_inner=32,
    up=32,
)

WIDTHS = {widths.name: widths for widths in (BASELINE, PRUNED)}
