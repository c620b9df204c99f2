"""The rows of the table: which networks, on how many frames, and what each costs by counting."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

# The one use of the network outside of export/ and its tests: PyTorch is compared with PyTorch.
from export.network import BASELINE, COMPACT, PRUNED, STUDENT, MstGan
from perf.clip import Frames, Size
from perf.peers.basicvsr import BasicVsr
from perf.peers.edvr import WINDOW as EDVR_WINDOW
from perf.peers.edvr import edvr_l, edvr_m
from perf.peers.improved_edvr import ImprovedEdvr
from perf.peers.rsdn import Rsdn
from perf.peers.still import Bicubic, EdsrBaseline

CLIP = 3  # frames of a recurrent network's clip; longer ones take longer and say the same per frame
WINDOW = 3  # of ours


@dataclass(frozen=True)
class Row:
    """One network of the table."""

    build: Callable[[], nn.Module]
    frames: int
    """Given to one run."""
    answers: int = 1
    """Frames that one run gives."""
    takes_bytes: bool = False
    """Ours converts and rounds in the graph; the others take and give floats."""

    def inputs(self, frames: Frames) -> Tensor:
        """(T, H, W, 3) uint8 frames as the network takes them."""
        clip = torch.from_numpy(frames[: self.frames])[None]
        return clip if self.takes_bytes else clip.permute(0, 1, 4, 2, 3).float() / 255


ROWS = {
    "MST-GAN": Row(lambda: MstGan(BASELINE), WINDOW, takes_bytes=True),
    "MST-GAN, pruned": Row(lambda: MstGan(PRUNED), WINDOW, takes_bytes=True),
    "MST-GAN, compact": Row(lambda: MstGan(COMPACT), WINDOW, takes_bytes=True),
    "MST-GAN, student": Row(lambda: MstGan(STUDENT), WINDOW, takes_bytes=True),
    "BasicVSR": Row(BasicVsr, CLIP, CLIP),
    "RSDN": Row(Rsdn, CLIP, CLIP),
    "EDVR-M": Row(edvr_m, EDVR_WINDOW),
    "EDVR-L": Row(edvr_l, EDVR_WINDOW),
    "Improved EDVR": Row(ImprovedEdvr, EDVR_WINDOW),
    "EDSR baseline": Row(EdsrBaseline, 1),
    "bicubic": Row(Bicubic, 1),
}


@dataclass(frozen=True)
class Cost:
    """What counting says of a network."""

    parameters: int
    flops: float
    """Per frame it gives, 2 x MAC, of convolutions and matrix products."""
    flow_flops: float
    """Of these, BasicVSR's optical flow."""


def count(row: Row, size: Size) -> Cost:
    """Count without computing anything; lr size as (height, width)."""
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        network = row.build()
        shape = (1, row.frames, *size, 3) if row.takes_bytes else (1, row.frames, 3, *size)
        network(torch.zeros(shape, dtype=torch.uint8 if row.takes_bytes else torch.float32))
    flow = sum(
        sum(by_operator.values())
        for module, by_operator in counter.get_flop_counts().items()
        if module.endswith(".spynet")
    )
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return Cost(parameters, counter.get_total_flops() / row.answers, flow / row.answers)
