"""Width tables: the numbers that tell the baseline network from its pruned form."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Widths:
    """Channel counts of one MST-GAN generator.

    Pruning narrows the channels *inside* residual blocks and the flow's refinement; what passes between
    blocks keeps its width, so a pruned layer is a slice of the baseline's and no skip connection is cut.
    Widths are multiples of 16, the granule of FP16 tensor cores.
    """

    name: str
    flow: int
    """Hidden channels of the flow's refinement at half resolution."""
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
    stem: int = 64
    """Channels of the encoder's first convolution."""
    detail: int = 48
    """Trunk channels at full resolution."""
    context_blocks: int = 6
    detail_blocks: int = 4


BASELINE = Widths(
    name="baseline",
    flow=32,
    encoder_inner=(64, 128, 256, 512),
    context_inner=128,
    detail_inner=48,
    up=48,
)

PRUNED = Widths(
    name="pruned",
    flow=16,
    encoder_inner=(32, 64, 160, 352),
    context_inner=32,
    detail_inner=32,
    up=32,
)

STUDENT = Widths(
    name="student",
    flow=16,
    encoder_inner=(16, 16, 32, 32),
    context_inner=32,
    detail_inner=32,
    up=16,
    encoder_outer=(32, 32, 64, 64),
    encoder_depths=(1, 1, 1, 1),
    laterals=(32, 32, 32, 32),
    stem=16,
    detail=32,
    context_blocks=1,
    detail_blocks=2,
)
"""A quarter of the pruned network's work: a network of its own, shallow, that learns from the pruned one."""

WIDTHS = {widths.name: widths for widths in (BASELINE, PRUNED, STUDENT)}
