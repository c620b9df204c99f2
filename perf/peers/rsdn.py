"""RSDN 9-128 (Isobe et al., ECCV 2020): structure and detail in two streams, one frame after the other.

Names of weights follow the authors' code.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perf.peers.layers import conv3x3, leaky

CHANNELS = 128
BLOCKS = 9
SUBPIXELS = 3 * 4 * 4


class StructureDetailBlock(nn.Module):
    """Both streams filtered by themselves, then each gets the sum (section 3.2)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_d1, self.conv_d2 = conv3x3(CHANNELS, CHANNELS), conv3x3(CHANNELS, CHANNELS)
        self.conv_s1, self.conv_s2 = conv3x3(CHANNELS, CHANNELS), conv3x3(CHANNELS, CHANNELS)

    def forward(self, detail: Tensor, structure: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 128, H, W) each -> same."""
        both = self.conv_d2(F.relu(self.conv_d1(detail))) + self.conv_s2(F.relu(self.conv_s1(structure)))
        return detail + both, structure + both


class Cell(nn.Module):
    """One step of the recurrence."""

    def __init__(self) -> None:
        super().__init__()
        c_in = 2 * 3 + CHANNELS + SUBPIXELS
        self.forget = conv3x3(3, 9)
        self.conv_d, self.conv_s = conv3x3(c_in, CHANNELS), conv3x3(c_in, CHANNELS)
        for index in range(1, BLOCKS + 1):
            self.add_module(f"SD{index}", StructureDetailBlock())
        self.conv_hd, self.conv_od = conv3x3(CHANNELS, CHANNELS), conv3x3(CHANNELS, SUBPIXELS)
        self.conv_hs, self.conv_os = conv3x3(CHANNELS, CHANNELS), conv3x3(CHANNELS, SUBPIXELS)

    def adapt(self, hidden: Tensor, frame: Tensor) -> Tensor:
        """Fade the parts of the hidden state that do not look like the frame (section 3.3).

        Every pixel has a 3x3 filter of its own, the same for all channels.
        """
        filters, likeness = leaky(self.forget(frame)), torch.zeros_like(hidden)
        h, w = hidden.shape[-2:]
        padded = F.pad(hidden, (1, 1, 1, 1))
        for tap in range(9):
            shifted = padded[:, :, tap // 3 : tap // 3 + h, tap % 3 : tap % 3 + w]
            likeness = likeness + filters[:, tap : tap + 1] * shifted
        return hidden * torch.sigmoid(likeness)

    def forward(
        self, detail: Tensor, structure: Tensor, hidden: Tensor, last: tuple[Tensor, Tensor], frame: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Two frames' parts, (N, 6, H, W) each, and the last step's state and answers -> the same, one on."""
        hidden = self.adapt(hidden, frame)
        detail = leaky(self.conv_d(torch.cat((detail, hidden, last[0]), dim=1)))
        structure = leaky(self.conv_s(torch.cat((structure, hidden, last[1]), dim=1)))
        for index in range(1, BLOCKS + 1):
            detail, structure = self.get_submodule(f"SD{index}")(detail, structure)
        hidden = leaky(self.conv_hd(detail)) + leaky(self.conv_hs(structure))
        return hidden, (self.conv_od(detail), self.conv_os(structure))


class Rsdn(nn.Module):
    """Forward in time; each step sees the frame, the one before and what it answered there."""

    def __init__(self) -> None:
        super().__init__()
        self.neuro = Cell()
        self.conv = conv3x3(2 * SUBPIXELS, SUBPIXELS)

    def forward(self, frames: Tensor) -> Tensor:
        """(N, T, 3, H, W), T > 1 -> (N, T, 3, 4H, 4W)."""
        n, t, _, h, w = frames.shape
        structures = structure_of(frames)
        hidden = frames.new_zeros(n, CHANNELS, h, w)
        last = (frames.new_zeros(n, SUBPIXELS, h, w), frames.new_zeros(n, SUBPIXELS, h, w))
        answers = []
        for index in range(t):
            pair = [index - 1 if index else 1, index]  # the first frame takes its successor instead
            parts = [part[:, pair].flatten(1, 2) for part in (frames - structures, structures)]
            hidden, last = self.neuro(*parts, hidden, last, frames[:, index])
            answers.append(F.pixel_shuffle(self.conv(torch.cat(last, dim=1)), 4))
        return torch.stack(answers, dim=1)


def structure_of(frames: Tensor) -> Tensor:
    """What is left after halving and doubling, (N, T, 3, H, W), H and W even -> same.

    Section 3.1 says bicubic; the authors' code, and so their checkpoint, has bilinear.
    """
    flat = frames.flatten(0, 1)
    half = F.interpolate(flat, scale_factor=0.5, mode="bilinear", align_corners=False)
    return F.interpolate(half, size=flat.shape[-2:], mode="bilinear", align_corners=False).view_as(frames)
