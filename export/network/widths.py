"""Width tables: the numbers that tell the baseline network from its pruned form, and what a light one is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Widths:
    """What every network has; with these alone it is a light one.

    Widths are multiples of 16, the multiple that suits FP16 tensor cores.
    """

    name: str
    body: int = 48
    """Channels at full resolution."""
    body_inner: tuple[int, ...]
    """Inner channels of the residual blocks at full resolution, one number for each."""


@dataclass(frozen=True, kw_only=True)
class PyramidWidths(Widths):
    """Channel counts of one MST-GAN generator, as the papers have it.

    Pruning narrows the channels *inside* residual blocks; what passes between blocks keeps its width, so a
    pruned layer is a slice of the baseline's and no skip connection is cut.
    """

    encoder_inner: tuple[int, int, int, int]
    """Bottleneck channels of layer1..layer4 (ResNet-50: 64, 128, 256, 512)."""
    encoder_outer: tuple[int, int, int, int] = (256, 512, 1024, 2048)
    encoder_depths: tuple[int, int, int, int] = (3, 4, 6, 3)
    stem: int = 64
    """Channels of the encoder's first convolution."""
    laterals: tuple[int, int, int, int] = (64, 96, 192, 192)
    """Pyramid channels at 1/4, 1/8, 1/16 and 1/32."""
    context_inner: int
    """Inner channels of the residual blocks at a quarter of the resolution."""
    context_blocks: int = 2
    up: int
    """Channels at half resolution, between the two x2 shuffles."""


BASELINE = PyramidWidths(
    name="baseline",
    encoder_inner=(32, 64, 256, 592),
    context_inner=96,
    body_inner=(64, 64, 64, 64, 64, 64),
    up=32,
)

PRUNED = PyramidWidths(
    name="pruned",
    encoder_inner=(16, 16, 48, 480),
    context_inner=16,
    body_inner=(32, 32, 32, 32, 48, 48),  # the last two do most, and keep most
    up=16,
)

COMPACT = Widths(name="compact", body_inner=(32, 32, 32, 32))
"""Half the pruned network's work: four residual blocks as its narrower ones, without the pyramid."""

STUDENT = Widths(name="student", body=32, body_inner=(32, 32, 32))
"""A quarter of the pruned network's work: a network of its own, shallow, that learns from the pruned one."""


def trunk(widths: PyramidWidths) -> Widths:
    """What is trained first, in half the time: the detail enhancement alone, as a light network."""
    return Widths(name=f"{widths.name}_trunk", body=widths.body, body_inner=widths.body_inner)


WIDTHS = {
    widths.name: widths for widths in (BASELINE, PRUNED, COMPACT, STUDENT, trunk(BASELINE), trunk(PRUNED))
}
