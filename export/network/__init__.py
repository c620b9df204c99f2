"""MST-GAN's generator as three modules, one per served model."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from export.network.align import FlowAlign
from export.network.generator import Generator
from export.network.layers import PixelShuffle
from export.network.pyramid import PyramidGenerator
from export.network.widths import BASELINE, COMPACT, PRUNED, STUDENT, WIDTHS, PyramidWidths, Widths

__all__ = [
    "BASELINE",
    "COMPACT",
    "PRUNED",
    "STUDENT",
    "WIDTHS",
    "FlowAlign",
    "Generator",
    "MstGan",
    "PixelShuffle",
    "PyramidWidths",
    "Widths",
]


class MstGan(nn.Module):
    """The three stages in a row, as the ensemble runs them; attribute names are the served models'."""

    def __init__(self, widths: Widths) -> None:
        super().__init__()
        self.widths = widths
        self.flow_align = FlowAlign()
        self.generator = PyramidGenerator(widths) if isinstance(widths, PyramidWidths) else Generator(widths)
        self.pixel_shuffle = PixelShuffle()

    def forward(self, lr_window: Tensor) -> Tensor:
        """(N, 3, H, W, 3) uint8 RGB -> (N, 4H, 4W, 3) uint8 RGB; H and W multiples of 4."""
        flow, aligned = self.flow_align(lr_window)
        return self.pixel_shuffle(self.generator(lr_window, flow, aligned))


def count(widths: Widths, lr_size: tuple[int, int] = (720, 1280)) -> tuple[int, float]:
    """Parameters, and floating-point operations per output frame (2 x MAC, convolutions) at ``lr_size``."""
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        network = MstGan(widths)
        network(torch.zeros(1, 3, *lr_size, 3, dtype=torch.uint8))
    return sum(p.numel() for p in network.parameters()), float(counter.get_total_flops())
