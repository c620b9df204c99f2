"""BasicVSR (Chan et al., CVPR 2021): bidirectional recurrence, features aligned by SPyNet's flow.

Names of weights follow BasicSR's release of the authors' checkpoints.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perf.peers.layers import Reconstruction, ResidualBlock, backward_warp, conv3x3, leaky

CHANNELS = 64
BLOCKS = 30  # per direction
PYRAMID = 6  # levels of SPyNet (Ranjan and Black, CVPR 2017)
MULTIPLE = 2 ** (PYRAMID - 1)


def flow_level() -> nn.ModuleDict:
    """One level of SPyNet (section 3.2): two images and a flow, (N, 8, h, w), to the flow's residual."""
    layers: list[nn.Module] = []
    for c_in, c_out in pairwise((8, 32, 64, 32, 16, 2)):
        layers += [nn.Conv2d(c_in, c_out, 7, padding=3), nn.ReLU()]
    return nn.ModuleDict({"basic_module": nn.Sequential(*layers[:-1])})


def trunk() -> nn.ModuleDict:
    """Frame and propagated features, (N, 3 + 64, H, W), to (N, 64, H, W)."""
    blocks = nn.Sequential(*(ResidualBlock(CHANNELS) for _ in range(BLOCKS)))
    return nn.ModuleDict({"main": nn.Sequential(conv3x3(CHANNELS + 3, CHANNELS), nn.LeakyReLU(0.1), blocks)})


class SpyNet(nn.Module):
    """Optical flow from coarse to fine."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.basic_module = nn.ModuleList(flow_level() for _ in range(PYRAMID))
        self.register_buffer("mean", torch.tensor((0.485, 0.456, 0.406)).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor((0.229, 0.224, 0.225)).view(1, 3, 1, 1))

    def forward(self, reference: Tensor, other: Tensor) -> Tensor:
        """Flow from ``reference`` to ``other``, (N, 3, H, W) each -> (N, 2, H, W) in pixels."""
        height, width = reference.shape[-2:]
        size = (height + -height % MULTIPLE, width + -width % MULTIPLE)
        pyramids = []
        for image in (reference, other):
            level = F.interpolate(image, size=size, mode="bilinear", align_corners=False)
            levels = [(level - self.mean) / self.std]
            for _ in range(PYRAMID - 1):
                levels.append(F.avg_pool2d(levels[-1], 2))
            pyramids.append(levels[::-1])
        flow = reference.new_zeros(len(reference), 2, size[0] // MULTIPLE, size[1] // MULTIPLE)
        for index, (level, center, neighbor) in enumerate(zip(self.basic_module, *pyramids, strict=True)):
            if index:
                flow = 2 * F.interpolate(flow, scale_factor=2.0, mode="bilinear", align_corners=True)
            warped = backward_warp(neighbor, flow, "border")
            flow = flow + level["basic_module"](torch.cat((center, warped, flow), dim=1))
        flow = F.interpolate(flow, size=(height, width), mode="bilinear", align_corners=False)
        return flow * flow.new_tensor((width / size[1], height / size[0])).view(1, 2, 1, 1)


class BasicVsr(Reconstruction):
    """Backward in time over the whole clip, then forward, and both merged at every frame."""

    def __init__(self) -> None:
        super().__init__(CHANNELS)
        self.spynet, self.backward_trunk, self.forward_trunk = SpyNet(), trunk(), trunk()
        self.fusion = nn.Conv2d(2 * CHANNELS, CHANNELS, 1)

    def forward(self, frames: Tensor) -> Tensor:
        """(N, T, 3, H, W) -> (N, T, 3, 4H, 4W)."""
        n, t, c, h, w = frames.shape
        earlier, later = (part.reshape(-1, c, h, w) for part in (frames[:, :-1], frames[:, 1:]))
        to_later, to_earlier = (
            self.spynet(*pair).view(n, t - 1, 2, h, w) for pair in ((earlier, later), (later, earlier))
        )
        features = frames.new_zeros(n, CHANNELS, h, w)
        from_future = []
        for index in reversed(range(t)):
            if index < t - 1:
                features = backward_warp(features, to_later[:, index], "zeros")
            features = self.backward_trunk["main"](torch.cat((frames[:, index], features), dim=1))
            from_future.append(features)
        features = torch.zeros_like(features)
        answers = []
        for index in range(t):
            if index:
                features = backward_warp(features, to_earlier[:, index - 1], "zeros")
            features = self.forward_trunk["main"](torch.cat((frames[:, index], features), dim=1))
            merged = leaky(self.fusion(torch.cat((from_future[t - 1 - index], features), dim=1)))
            answers.append(self.reconstruct(merged, frames[:, index]))
        return torch.stack(answers, dim=1)
