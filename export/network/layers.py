"""What several parts of the network are made of."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def conv3x3(c_in: int, c_out: int) -> nn.Conv2d:
    """A 3x3 convolution that keeps the size."""
    return nn.Conv2d(c_in, c_out, 3, padding=1)


def zeroed(conv: nn.Conv2d) -> nn.Conv2d:
    """The same convolution, answering zero until trained: the last one of a residual branch."""
    nn.init.zeros_(conv.weight)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


def convolutions(network: nn.Module) -> dict[str, nn.Conv2d]:
    """All of them, by name, in the network's order."""
    return {name: module for name, module in network.named_modules() if isinstance(module, nn.Conv2d)}


class ResidualBlock(nn.Module):
    """x + conv(relu(conv(x))); starts as the identity."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(channels, inner)
        self.conv2 = zeroed(conv3x3(inner, channels))

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, h, w) -> same."""
        return x + self.conv2(F.relu(self.conv1(x)))
