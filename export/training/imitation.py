"""Learning from teachers: their answers, and what a larger network computes on the way to them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.checkpoint import load_checkpoint
from export.errors import ExportError
from export.network import MstGan, PyramidWidths, Widths
from export.network.generator import Features
from export.spec import CHANNELS, SCALE, WINDOW
from export.training.losses import PIXEL_LOSSES

TURNS = (lambda x: x.flip(-1), lambda x: x.flip(-2), lambda x: x.mT)  # each undoes itself; together all eight


class SingleImageTeacher(nn.Module):
    """A network of any make that upscales one frame by 4, as ``torch.export.save`` wrote it (``.pt2``).

    It takes (N, 3, h, w) float32 RGB, 0..1, of any N, h and w, and gives (N, 3, 4h, 4w). Loading it runs no
    code of its author's.
    """

    def __init__(self, path: Path) -> None:
        """Raises ExportError if there is no such network in the file."""
        super().__init__()
        self.name = path.stem
        expected = (
            f"expected {path} to hold a network from (N, 3, h, w) to (N, 3, {SCALE}h, {SCALE}w), all three "
            "dynamic, written by torch.export.save"
        )
        try:
            self.network: nn.Module = torch.export.load(path).module()
        except Exception as err:  # torch documents none
            raise ExportError(f"{expected}; it cannot be read: {str(err).partition(chr(10))[0]}") from err
        for n, h, w in ((2, 16, 24), (3, 48, 48)):
            try:
                found = tuple(self.network(torch.zeros(n, CHANNELS, h, w)).shape)
            except Exception as err:  # whatever its operators raise
                raise ExportError(f"{expected}; it refused {(n, CHANNELS, h, w)}") from err
            if found != (n, CHANNELS, SCALE * h, SCALE * w):
                raise ExportError(f"{expected}; found {found} from {(n, CHANNELS, h, w)}")

    def forward(self, frames: Tensor) -> Tensor:
        """(N, 3, h, w) -> (N, 3, 4h, 4w), both 0..1."""
        hr: Tensor = self.network(frames)
        return hr


Teacher = MstGan | SingleImageTeacher


class Imitation(nn.Module):
    """Teachers, and the 1x1 convolutions through which a network of other widths is compared with one.

    Several teachers answer with one voice, the mean: a ``SingleImageTeacher`` may know better what a window's
    middle frame tells, ours what its neighbours add.

    Features are compared where the detail enhancement ends and, between two networks that have one, where
    the papers' pyramid does (as "hints" in FitNets, Romero et al. 2015). Where both networks have as many
    channels there is nothing to convert. A single-image teacher has none to compare.

    A ``turned`` teacher is shown each window turned, mirrored and reversed at random; its answer is turned
    back. On average it teaches what the mean over all these views would, at the price of one; the mean over
    the eight turns is 0.12 dB nearer to the truth than the baseline's one view. Its features are of the
    turned window, and are not compared.
    """

    def __init__(
        self,
        teachers: Sequence[Teacher],
        student: Widths,
        pixel_loss: str = "mixed",
        turned: bool = False,
    ) -> None:
        """``pixel_loss`` is the distance between answers, one of ``losses.PIXEL_LOSSES``."""
        super().__init__()
        self.names = [one.widths.name if isinstance(one, MstGan) else one.name for one in teachers]
        self.teachers = nn.ModuleList(teachers).requires_grad_(False)
        self.pixel_loss, self.turned = PIXEL_LOSSES[pixel_loss], turned
        channels = list[tuple[int, int]]()
        if len(teachers) == 1 and isinstance(teachers[0], MstGan) and not turned:
            both = _channels(student), _channels(teachers[0].widths)
            channels += zip(*both, strict=False)  # what both have
        self.adapters = nn.ModuleList(
            nn.Identity() if mine == theirs else nn.Conv2d(mine, theirs, 1) for mine, theirs in channels
        )

    @torch.no_grad()
    def taught(self, frames: Tensor, bf16: bool) -> tuple[Tensor, Features | None]:
        """The sub-pixels, (N, 48, h, w) float32, and perhaps features of (N, 3, 3, h, w) frames, 0..1.

        Turned teachers' frames are square. They, several, and single-image teachers give no features.
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

    def _answer(self, frames: Tensor, bf16: bool) -> tuple[Tensor, Features | None]:
        answers, features = [], None
        for teacher in self.teachers:
            if isinstance(teacher, MstGan):
                flow, aligned, _ = teacher.flow_align.align(frames)
                with torch.autocast(frames.device.type, torch.bfloat16, enabled=bf16):
                    features = teacher.generator.features(frames, flow, aligned)
                    answer = teacher.generator.finish(features, frames)
            else:
                with torch.autocast(frames.device.type, torch.bfloat16, enabled=bf16):
                    answer = F.pixel_unshuffle(teacher(frames[:, WINDOW // 2]), SCALE)
            answers.append(answer.float())
        return torch.stack(answers).mean(0), features if len(self.adapters) else None

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


def load_teacher(path: Path) -> Teacher:
    """A checkpoint of ours, or a single-image network (``.pt2``); raises ExportError if it is neither."""
    return SingleImageTeacher(path) if path.suffix == ".pt2" else load_checkpoint(path)
