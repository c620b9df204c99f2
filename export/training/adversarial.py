"""The adversarial objective: what the generator is told, and how its discriminator learns, in turns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from export.network.bicubic import BicubicSubpixels
from export.spec import CHANNELS, SCALE
from export.training.device import placed
from export.training.discriminator import FRAMES, Discriminator
from export.training.optimizer import set_rate
from export.training.options import TrainOptions
from export.training.perceptual import DistilledVgg

NOISE = 0.05  # standard deviation at the start of a run, in units of the image range
STEPS_PER_SEED = 1 << 32


class Adversary:
    """A discriminator that learns beside the generator, by the hinge loss, and the perceptual loss.

    What the discriminator sees, footage and answers alike, is noisy: their distributions overlap from the
    start and its gradients stay of use (Sonderby et al. 2017). The noise fades out linearly over the run.
    """

    def __init__(self, options: TrainOptions, perceptual: DistilledVgg | None, device: torch.device) -> None:
        """A fresh discriminator on ``device``; without ``perceptual`` its loss is left out."""
        self.options, self.device = options, device
        self.discriminator = placed(Discriminator(), device)
        self.perceptual = placed(perceptual, device) if perceptual else None
        self.bicubic = BicubicSubpixels(CHANNELS, SCALE).to(device)
        # No first moment: what told yesterday's answers from footage does not tell today's.
        self.optimizer = torch.optim.Adam(self.discriminator.parameters(), betas=(0.0, 0.99), fused=True)
        self._seen: tuple[Tensor, Tensor, Tensor, torch.Generator, float] | None = None

    def judge(
        self, answers: Tensor, truth: Tensor, lr: Tensor, step: int, progress: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What the generator is told; `learn` then learns from the same frames.

        Args:
            answers: (N, 3, 3, H, W) float32: consecutive hr frames.
            truth: same.
            lr: (N, 3, H/4, W/4) float32: the middle frame.
            step: with the seed, decides the noise.
            progress: of the run, 0..1.

        Returns:
            The weighed loss, and its parts, detached.
        """
        assert answers.shape[1] == FRAMES
        noise = torch.Generator(self.device).manual_seed(self.options.seed * STEPS_PER_SEED + step)
        sigma = NOISE * max(0.0, 1 - progress)
        bicubic = F.pixel_shuffle(self.bicubic(lr), SCALE)
        self.discriminator.requires_grad_(False)
        with self._precision():
            deceit = -self.discriminator(_noisy(answers, sigma, noise), bicubic).mean()
        self._seen = (answers.detach(), truth, bicubic, noise, sigma)
        total = self.options.adversarial_weight * deceit
        parts = {"adversarial": deceit.detach()}
        if self.perceptual:
            with self._precision():
                distance = self.perceptual(answers.flatten(0, 1), truth.flatten(0, 1))
            total = total + self.options.perceptual_weight * distance
            parts["perceptual"] = distance.detach()
        return total, parts

    def learn(self, learning_rate: float) -> Tensor:
        """One update of the discriminator on what was judged last; returns its loss, 0..2 and above."""
        assert self._seen is not None
        answers, truth, bicubic, noise, sigma = self._seen
        self._seen = None
        self.discriminator.requires_grad_(True)
        self.optimizer.zero_grad(set_to_none=True)
        with self._precision():
            real = self.discriminator(_noisy(truth, sigma, noise), bicubic)
            fake = self.discriminator(_noisy(answers, sigma, noise), bicubic)
        loss = F.relu(1 - real).mean() + F.relu(1 + fake).mean()
        loss.backward()
        set_rate(self.optimizer, learning_rate)
        self.optimizer.step()
        return loss.detach()

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.bf16)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs."""
        return {"discriminator": self.discriminator.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a ``state_dict``."""
        self.discriminator.load_state_dict(state["discriminator"])
        self.optimizer.load_state_dict(state["optimizer"])


def _noisy(frames: Tensor, sigma: float, noise: torch.Generator) -> Tensor:
    return frames + sigma * torch.randn(frames.shape, device=frames.device, generator=noise)
