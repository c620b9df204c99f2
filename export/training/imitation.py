"""Learning from a teacher: a larger network's answers, and what it computes on the way to them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.network import MstGan, PyramidWidths, Widths
from export.network.generator import Features
from export.training.losses import charbonnier


class Imitation(nn.Module):
    """A teacher, and the 1x1 convolutions through which a network of other widths is compared with it.

    Features are compared where the detail enhancement ends and, between two networks that have one, where
    the papers' pyramid does (as "hints" in FitNets, Romero et al. 2015). Where both networks have as many
    channels there is nothing to convert.
    """

    def __init__(self, teacher: MstGan, student: Widths) -> None:
        super().__init__()
        self.teacher = teacher.eval().requires_grad_(False)
        channels = zip(_channels(student), _channels(teacher.widths), strict=False)  # what both have
        self.adapters = nn.ModuleList(
            nn.Identity() if mine == theirs else nn.Conv2d(mine, theirs, 1) for mine, theirs in channels
        )

    @torch.no_grad()
    def taught(self, frames: Tensor, bf16: bool) -> tuple[Tensor, Features]:
        """The teacher's sub-pixels, (N, 48, h, w) float32, and features of (N, 3, 3, h, w) frames, 0..1."""
        flow, aligned, _ = self.teacher.flow_align.align(frames)
        generator = self.teacher.generator
        with torch.autocast(frames.device.type, torch.bfloat16, enabled=bf16):
            features = generator.features(frames, flow, aligned)
            return generator.finish(features, frames).float(), features

    def distances(
        self, answer: Tensor, features: Features, taught: tuple[Tensor, Features]
    ) -> tuple[Tensor, Tensor]:
        """How far a network's sub-pixels and features are from the teacher's.

        The former as Charbonnier's distance, the latter as a share of the mean feature, averaged over places.
        """
        their_answer, their_features = taught
        known = [
            (mine.float(), theirs.float())
            for mine, theirs in zip(features, their_features, strict=True)
            if mine is not None and theirs is not None
        ]
        shares = [
            F.l1_loss(adapter(mine), theirs) / theirs.abs().mean().clamp_min(1e-6)
            for adapter, (mine, theirs) in zip(self.adapters, known, strict=True)
        ]
        return charbonnier(answer, their_answer), torch.stack(shares).mean()


def _channels(widths: Widths) -> tuple[int, ...]:
    """Of ``Features``, in their order."""
    return (widths.detail, widths.laterals[0]) if isinstance(widths, PyramidWidths) else (widths.detail,)
