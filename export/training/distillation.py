"""Distillation: learning from the answers of a larger network, and from its features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.network import MstGan, PyramidWidths, Widths
from export.network.generator import Features
from export.spec import SCALE
from export.training.losses import PIXEL_LOSSES

# Each is its own inverse; together with the identity they give all eight flips and quarter turns.
FLIPS = (lambda x: x.flip(-1), lambda x: x.flip(-2), lambda x: x.mT)


class Distillation(nn.Module):
    """A teacher, and the 1x1 convolutions that convert a student's features to the teacher's channels.

    Features are compared where the detail enhancement ends and, between two networks that have one, where
    the papers' pyramid does (as "hints" in FitNets, Romero et al. 2015). Where both networks have as many
    channels there is nothing to convert.

    An ``augmented`` teacher sees each window flipped, turned and reversed in time at random; its answer is
    transformed back. The mean over such views is a self-ensemble (Timofte et al. 2016), 0.12 dB nearer to the
    truth than one view of the baseline; one random view per step has the same expected target at the price of
    one. Its features are of the transformed window, and are not compared.
    """

    def __init__(
        self, teacher: MstGan, student: Widths, pixel_loss: str = "charbonnier_mse", augmented: bool = False
    ) -> None:
        """``pixel_loss`` is the distance between answers, one of ``losses.PIXEL_LOSSES``."""
        super().__init__()
        self.teacher = teacher.requires_grad_(False)
        self.pixel_loss, self.augmented = PIXEL_LOSSES[pixel_loss], augmented
        pairs = zip(_channels(student), _channels(teacher.widths), strict=False)  # what both have
        self.adapters = nn.ModuleList(
            nn.Identity() if mine == theirs else nn.Conv2d(mine, theirs, 1)
            for mine, theirs in pairs
            if not augmented
        )

    @torch.no_grad()
    def targets(self, frames: Tensor, bf16: bool) -> tuple[Tensor, Features | None]:
        """What the teacher answers.

        Args:
            frames: (N, 3, 3, h, w) float32, 0..1; square for an augmented teacher.
            bf16: arithmetic of the teacher's convolutions.

        Returns:
            Sub-pixels (N, 48, h, w) float32, and features, if they are to be compared.
        """
        if not self.augmented:
            return self._answer(frames, bf16)
        # Random numbers on the device: a CUDA graph can use no others.
        coins = torch.rand(len(FLIPS) + 1, len(frames), 1, 1, 1, device=frames.device) < 0.5
        flips = list(zip(FLIPS, coins[1:], strict=True))
        seen = torch.where(coins[0, ..., None], frames.flip(1), frames)
        for flip, coin in flips:
            seen = torch.where(coin[..., None], flip(seen), seen)
        answer, _ = self._answer(seen, bf16)
        hr = F.pixel_shuffle(answer, SCALE)
        for flip, coin in reversed(flips):
            hr = torch.where(coin, flip(hr), hr)
        return F.pixel_unshuffle(hr, SCALE), None

    def _answer(self, frames: Tensor, bf16: bool) -> tuple[Tensor, Features]:
        flow, aligned, _ = self.teacher.flow_align.align(frames)
        with torch.autocast(frames.device.type, torch.bfloat16, enabled=bf16):
            features = self.teacher.generator.features(frames, flow, aligned)
            answer: Tensor = self.teacher.generator.finish(features, frames)
        return answer.float(), features

    def losses(
        self, answer: Tensor, features: Features, targets: tuple[Tensor, Features | None]
    ) -> tuple[Tensor, Tensor]:
        """Distances of a student's sub-pixels and features from the teacher's.

        Returns:
            The pixel loss; and the mean absolute difference of features over the teacher's mean feature,
            averaged over the places that are compared, 0 if none is.
        """
        their_answer, their_features = targets
        distance = self.pixel_loss(answer, their_answer)
        if their_features is None:
            return distance, distance.new_zeros(())
        known = [
            (mine.float(), theirs.float())
            for mine, theirs in zip(features, their_features, strict=True)
            if mine is not None and theirs is not None
        ]
        shares = [
            F.l1_loss(adapter(mine), theirs) / theirs.abs().mean().clamp_min(1e-6)
            for adapter, (mine, theirs) in zip(self.adapters, known, strict=True)
        ]
        return distance, torch.stack(shares).mean()


def _channels(widths: Widths) -> tuple[int, ...]:
    """Of ``Features``, in their order."""
    return (widths.body, widths.laterals[0]) if isinstance(widths, PyramidWidths) else (widths.body,)
