"""Optimizers: Muon for convolution kernels, Adam for everything else."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from export.training.config import Config

MOMENTUM = 0.95
NEWTON_SCHULZ = 3.4445, -4.7750, 2.0315  # coefficients of Jordan's quintic
ITERATIONS = 5
RMS = 0.2  # of an update over the learning rate, about Adam's: the same learning rates suit both
BETAS = 0.9, 0.99
DEVICE_SETTINGS = "lr", "capturable"  # of a parameter group; they depend on the device


def adam(parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.Adam:
    """Adam as all training here uses it; on a GPU its steps can be part of a CUDA graph."""
    parameters = list(parameters)
    is_cuda = any(parameter.is_cuda for parameter in parameters)
    return torch.optim.Adam(parameters, lr=_rate(parameters, lr), betas=BETAS, fused=True, capturable=is_cuda)


def scheduled_rate(config: Config, step: int, progress: float) -> float:
    """Learning rate: warm-up, plateau, half cosine; the plateau lets a run be extended without a restart.

    Args:
        config: of the run.
        step: from 0.
        progress: of the run at that step, 0..1.
    """
    decay = max(0.0, (progress - (1 - config.decay_share)) / config.decay_share)
    height = (1 + math.cos(math.pi * min(decay, 1.0))) / 2
    rate = config.final_lr + (config.lr - config.final_lr) * height
    return rate * min(1.0, (step + 1) / max(config.warmup, 1))


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of the next step."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)  # where a CUDA graph reads it
        else:
            group["lr"] = lr


def resume(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load ``state``, which may come from another kind of device."""
    kept = [
        {name: group[name] for name in group if name in DEVICE_SETTINGS} for group in optimizer.param_groups
    ]
    optimizer.load_state_dict(state)
    for group, settings in zip(optimizer.param_groups, kept, strict=True):
        group.update(settings)


def _rate(parameters: Sequence[nn.Parameter], lr: float) -> float | Tensor:
    """On a GPU a tensor in its memory, which a CUDA graph reads at each step."""
    device = next((parameter.device for parameter in parameters if parameter.is_cuda), None)
    return torch.tensor(lr, device=device) if device else lr


class Muon(torch.optim.Optimizer):
    """Updates each kernel by its orthogonalized momentum, all singular values about 1 (Jordan et al. 2024).

    A kernel counts as a matrix, one row per output channel. Biases use Adam: Muon needs matrices.
    ``torch.optim.Muon`` takes only matrices, one after the other; here kernels of one shape are batched, to
    keep a GPU busy. Updates are scaled as by Liu et al. 2025, so that Adam's learning rates hold.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float) -> None:
        parameters = list(parameters)
        super().__init__(parameters, {"lr": _rate(parameters, lr)})
        by_shape: dict[torch.Size, list[nn.Parameter]] = {}
        for parameter in parameters:
            if parameter.ndim > 1:
                by_shape.setdefault(parameter.shape, []).append(parameter)
        self.kernels = list(by_shape.values())
        self.adam = adam([p for p in parameters if p.ndim < 2], lr)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update; ``closure`` is not supported."""
        lr = self.param_groups[0]["lr"]
        self.adam.param_groups[0]["lr"] = lr
        self.adam.step()
        for kernels in self.kernels:
            moving = {kernel: kernel.grad for kernel in kernels if kernel.grad is not None}
            if moving:
                updates = orthogonal(torch.stack([self._momentum(*pair) for pair in moving.items()]))
                step = lr * RMS * math.sqrt(max(updates.shape[1:]))
                for kernel, update in zip(moving, updates, strict=True):
                    kernel.sub_(step * update.view(kernel.shape))

    def _momentum(self, kernel: nn.Parameter, gradient: Tensor) -> Tensor:
        """Nesterov momentum, as a matrix."""
        state = self.state[kernel]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(kernel)
        momentum: Tensor = state["momentum"].lerp_(gradient, 1 - MOMENTUM)
        return gradient.lerp(momentum, MOMENTUM).flatten(1)

    def state_dict(self) -> dict[str, Any]:
        """State of both optimizers."""
        return {**super().state_dict(), "adam": self.adam.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of both optimizers."""
        own = {name: state_dict[name] for name in ("state", "param_groups")}
        super().load_state_dict(own)
        resume(self.adam, state_dict["adam"])


def orthogonal(matrices: Tensor) -> Tensor:
    """Matrices (N, rows, columns) with their singular values brought near one, most to within 0.7 to 1.2."""
    a, b, c = NEWTON_SCHULZ
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.bfloat16()
    if is_tall:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(torch.finfo(torch.float32).eps)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).to(matrices.dtype)


OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter], float], torch.optim.Optimizer]] = {
    "muon": Muon,
    "adam": adam,
}
