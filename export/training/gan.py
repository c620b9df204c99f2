"""The adversarial objective: a temporal discriminator, its hinge loss, and the perceptual loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm

from export.network.layers import BicubicSubpixels
from export.spec import CHANNELS, SCALE
from export.training.config import Config
from export.training.device import to_channels_last
from export.training.optimizer import set_rate
from export.training.perceptual import DistilledVgg

FRAMES = 3  # scored together: flicker shows in nothing less
WIDTHS = (64, 64, 128, 128, 256)  # channels at 1, 1/2, 1/4, 1/8 and 1/16 of the hr resolution
SLOPE = 0.2
NOISE = 0.05  # standard deviation at the start of a run, in units of the image range
STEPS_PER_SEED = 1 << 32


class Discriminator(nn.Module):
    """Strided convolutions to a score per patch, each of spectral norm 1 (Miyato et al. 2018).

    It tells three consecutive frames of video from three answers of the generator. It also sees the middle
    frame's bicubic upscale: an answer must be real video of this very picture. Under autocast its
    convolutions run in bf16, but the estimates of the spectral norm, which would not survive that, in FP32.
    """

    def __init__(self) -> None:
        super().__init__()
        first, *deeper = WIDTHS
        layers: list[nn.Module] = [nn.Conv2d((FRAMES + 1) * CHANNELS, first, 3, padding=1)]
        for before, width in zip(WIDTHS, deeper, strict=False):
            layers.append(nn.Conv2d(before, width, 4, stride=2, padding=1))
        layers.append(nn.Conv2d(WIDTHS[-1], 1, 3, padding=1))
        self.layers = nn.ModuleList(spectral_norm(layer) for layer in layers)

    def forward(self, frames: Tensor, bicubic: Tensor) -> Tensor:
        """Score frames.

        Args:
            frames: (N, 3, 3, H, W) float32, nominally 0..1: frames t-1, t, t+1; sides multiples of 16.
            bicubic: (N, 3, H, W) float32: frame t, upscaled from lr.

        Returns:
            (N, 1, H/16, W/16) float32: above 0 looks like video, below like an answer.
        """
        x = torch.cat((frames.flatten(1, 2), bicubic), 1) * 2 - 1
        *hidden, last = self.layers
        with parametrize.cached():
            with torch.autocast(frames.device.type, enabled=False):
                for layer in self.layers:
                    _ = layer.weight  # estimates its norm, once
            for layer in hidden:
                x = F.leaky_relu(layer(x), SLOPE)
            scores: Tensor = last(x)
        return scores.float()


class AdversarialLoss:
    """A discriminator that is trained beside the generator, by the hinge loss, and the perceptual loss.

    What the discriminator sees, video and answers alike, is noisy: their distributions overlap from the start
    and its gradients stay of use (Sonderby et al. 2017). The noise fades out linearly over the run.
    """

    def __init__(self, config: Config, perceptual: DistilledVgg | None, device: torch.device) -> None:
        """A fresh discriminator on ``device``; without ``perceptual`` its loss is left out."""
        self.config, self.device = config, device
        self.discriminator = to_channels_last(Discriminator(), device)
        self.perceptual = to_channels_last(perceptual, device) if perceptual else None
        self.bicubic = BicubicSubpixels(CHANNELS, SCALE).to(device)
        # No first moment: gradients against earlier answers are not those against today's.
        self.optimizer = torch.optim.Adam(self.discriminator.parameters(), betas=(0.0, 0.99), fused=True)
        self._last: tuple[Tensor, Tensor, Tensor, torch.Generator, float] | None = None

    def generator_loss(
        self, answers: Tensor, truth: Tensor, lr: Tensor, step: int, progress: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The generator's loss; `discriminator_step` then uses the same frames.

        Args:
            answers: (N, 3, 3, H, W) float32: consecutive hr frames.
            truth: same.
            lr: (N, 3, H/4, W/4) float32: the middle frame.
            step: with the seed, decides the noise.
            progress: of the run, 0..1.

        Returns:
            The weighted loss, and its parts, detached.
        """
        assert answers.shape[1] == FRAMES
        noise = torch.Generator(self.device).manual_seed(self.config.seed * STEPS_PER_SEED + step)
        sigma = NOISE * max(0.0, 1 - progress)
        bicubic = F.pixel_shuffle(self.bicubic(lr), SCALE)
        self.discriminator.requires_grad_(False)
        with self._precision():
            adversarial = -self.discriminator(_noisy(answers, sigma, noise), bicubic).mean()
        self._last = (answers.detach(), truth, bicubic, noise, sigma)
        total = self.config.adversarial_weight * adversarial
        parts = {"adversarial": adversarial.detach()}
        if self.perceptual:
            with self._precision():
                distance = self.perceptual(answers.flatten(0, 1), truth.flatten(0, 1))
            total = total + self.config.perceptual_weight * distance
            parts["perceptual"] = distance.detach()
        return total, parts

    def discriminator_step(self, learning_rate: float) -> Tensor:
        """One update of the discriminator on the generator's last answers; returns its loss, at least 0."""
        assert self._last is not None
        answers, truth, bicubic, noise, sigma = self._last
        self._last = None
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
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.bf16)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs."""
        return {"discriminator": self.discriminator.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a ``state_dict``."""
        self.discriminator.load_state_dict(state["discriminator"])
        self.optimizer.load_state_dict(state["optimizer"])


def _noisy(frames: Tensor, sigma: float, noise: torch.Generator) -> Tensor:
    return frames + sigma * torch.randn(frames.shape, device=frames.device, generator=noise)
