"""Learning from a teacher: a larger network's answers, and what it computes on the way to them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.network import MstGan, PyramidWidths, Widths
from export.network.generator import Features
from export.spec import SCALE
from export.training.losses import PIXEL_LOSSES

TURNS = (lambda x: x.flip(-1), lambda x: x.flip(-2), lambda x: x.mT)  # each undoes itself; together all eight


class Imitation(nn.Module):
    """A teacher, and the 1x1 convolutions through which a network of other widths is compared with it.

    Features are compared where the detail enhancement ends and, between two networks that have one, where
    the papers' pyramid does (as "hints" in FitNets, Romero et al. 2015). Where both networks have as many
    channels there is nothing to convert.

    A ``turned`` teacher is shown each window turned, mirrored and reversed at random; its answer is turned
    back. On average it teaches what the mean over all these views would, at the price of one; the mean over
    the eight turns is 0.12 dB nearer to the truth than the baseline's one view. Its features are of the
    turned window, and are not compared.
    """

    def __init__(
        self, teacher: MstGan, student: Widths, pixel_loss: str = "mixed", turned: bool = False
    ) -> None:
        """``pixel_loss`` is the distance between answers, one of ``losses.PIXEL_LOSSES``."""
        super().__init__()
        self.teacher = teacher.eval().requires_grad_(False)
        self.pixel_loss, self.turned = PIXEL_LOSSES[pixel_loss], turned
        both = zip(_channels(student), _channels(teacher.widths), strict=False)  # what both have
        channels = [] if turned else list(both)
        self.adapters = nn.ModuleList(
            nn.Identity() if mine == theirs else nn.Conv2d(mine, theirs, 1) for mine, theirs in channels
        )

    @torch.no_grad()
    def taught(self, frames: Tensor, bf16: bool) -> tuple[Tensor, Features | None]:
        """The teacher's sub-pixels, (N, 48, h, w) float32, and features of (N, 3, 3, h, w) frames, 0..1.

        A turned teacher's frames are square, and it gives no features.
        """
        if not self.turned:
            return self._answer(frames, bf16)
        # Tossed where the frames are: a recorded step has no other chance.
        coins = torch.rand(len(TURNS) + 1, len(frames), 1, 1, 1, device=frames.device) < 0.5
        turns = list(zip(TURNS, coins[1:], strict=True))
        seen = torch.where(coins[0, ..., None], frames.flip(1), frames)
        for turn, coin in turns:
            seen = torch.where(coin[..., None], turn(seen), seen)
        answer, _ = self._answer(seen, bf16)
        hr = F.pixel_shuffle(answer, SCALE)
        for turn, coin in reversed(turns):
            hr = torch.where(coin, turn(hr), hr)
        return F.pixel_unshuffle(hr, SCALE), None

    def _answer(self, frames: Tensor, bf16: bool) -> tuple[Tensor, Features]:
        flow, aligned, _ = self.teacher.flow_align.align(frames)
        generator = self.teacher.generator
        with torch.autocast(frames.device.type, torch.bfloat16, enabled=bf16):
            features = generator.features(frames, flow, aligned)
            return generator.finish(features, frames).float(), features

    def distances(
        self, answer: Tensor, features: Features, taught: tuple[Tensor, Features | None]
    ) -> tuple[Tensor, Tensor]:
        """How far a network's sub-pixels and features are from the teacher's.

        The former as the pixel loss has it; the latter as a share of the mean feature, averaged over places,
        zero if there are none.
        """
        their_answer, their_features = taught
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
    return (widths.detail, widths.laterals[0]) if isinstance(widths, PyramidWidths) else (widths.detail,)
