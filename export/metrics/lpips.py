"""LPIPS (squeeze v0.1): the learned perceptual distance of Zhang et al. 2018, on SqueezeNet 1.1 features.

The weights are not part of the project. They are two files of the layouts in which they are published:
torchvision's SqueezeNet 1.1 features, and the linear heads of the authors' ``lpips`` package.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from export.errors import ExportError

NAME = "LPIPS (squeeze v0.1)"  # not comparable with AlexNet's or VGG's
BACKBONE_FILE = "squeeze_backbone.pth"
HEADS_FILE = "lpips_squeeze_v0.1_lin.pth"

# ImageNet's statistics, for images in -1..1.
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
EPSILON = 1e-10  # added to the length of a feature vector
TAPS = (1, 4, 7, 9, 10, 11, 12)  # layers of the backbone whose answers are compared
WIDTHS = (64, 128, 256, 384, 384, 512, 512)  # channels there


class Fire(nn.Module):
    """SqueezeNet's block: few channels, then many, by 1x1 and 3x3 in parallel."""

    def __init__(self, width: int, squeezed: int, expanded: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(width, squeezed, 1)
        self.expand1x1 = nn.Conv2d(squeezed, expanded, 1)
        self.expand3x3 = nn.Conv2d(squeezed, expanded, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, width, H, W) to (N, 2 * expanded, H, W)."""
        x = self.squeeze(x).relu()
        return torch.cat([self.expand1x1(x), self.expand3x3(x)], 1).relu()


def _pool() -> nn.MaxPool2d:
    return nn.MaxPool2d(3, 2, ceil_mode=True)


class Lpips(nn.Module):
    """Distance of two images: 0 for equal ones, larger for what looks less alike."""

    def __init__(self) -> None:
        """Without weights yet; see `load_lpips`."""
        super().__init__()
        # In torchvision's order, whose indices are the keys of the published file.
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 64, 3, stride=2), nn.ReLU(), _pool(),
            Fire(64, 16, 64), Fire(128, 16, 64), _pool(),
            Fire(128, 32, 128), Fire(256, 32, 128), _pool(),
            Fire(256, 48, 192), Fire(384, 48, 192), Fire(384, 64, 256), Fire(512, 64, 256),
        )  # fmt: skip
        self.heads = nn.ParameterList(torch.zeros(1, width, 1, 1) for width in WIDTHS)
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1), persistent=False)
        self.shift: Tensor
        self.scale: Tensor

    def _features(self, images: Tensor) -> list[Tensor]:
        """Vectors of unit length at every tap."""
        x = (images * 2 - 1 - self.shift) / self.scale
        features = []
        for index, layer in enumerate(self.backbone):
            x = layer(x)
            if index in TAPS:
                features.append(x / (x.norm(dim=1, keepdim=True) + EPSILON))
        return features

    def forward(self, images: Tensor, truth: Tensor) -> Tensor:
        """(N,) distances of (N, 3, H, W) float32 RGB images, 0..1, both sides at least 32."""
        distances = [
            (head * (a - b) ** 2).sum(1).mean((1, 2))
            for head, a, b in zip(self.heads, self._features(images), self._features(truth), strict=True)
        ]
        return torch.stack(distances).sum(0)

    @torch.inference_mode()
    def of_frames(self, image: NDArray[np.uint8], truth: NDArray[np.uint8]) -> float:
        """Distance of two (H, W, 3) uint8 RGB frames."""
        both = torch.from_numpy(np.stack([image, truth])).to(self.shift.device)
        images = both.permute(0, 3, 1, 2).float() / 255
        return float(self(images[:1], images[1:]))


def load_lpips(folder: Path) -> Lpips:
    """Read the two files of weights in ``folder``; in evaluation mode, on the CPU.

    Raises:
        ExportError: a file is missing, or holds something else.
    """
    lpips = Lpips()
    backbone, heads = _read(folder / BACKBONE_FILE), _read(folder / HEADS_FILE)
    named_heads = {f"{i}": heads.get(f"lin{i}.model.1.weight", torch.empty(0)) for i in range(len(TAPS))}
    for path, module, state in (
        (folder / BACKBONE_FILE, lpips.backbone, backbone),
        (folder / HEADS_FILE, lpips.heads, named_heads),
    ):
        try:
            module.load_state_dict(state)
        except RuntimeError as err:
            raise ExportError(
                f"expected weights of {NAME} in {path}, found other keys or shapes: "
                f"{str(err).splitlines()[-1].strip()}; pass the folder that holds the published files"
            ) from err
    return lpips.eval().requires_grad_(False)


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ExportError(
            f"expected weights of {NAME} at {path}, found no file; pass --weights FOLDER with it"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as err:  # unpickling fails in as many ways as there are broken files
        raise ExportError(
            f"expected {path} to be a PyTorch state dict, found something else ({err})"
        ) from err
    if not isinstance(state, dict):
        raise ExportError(f"expected {path} to be a PyTorch state dict, found a {type(state).__name__}")
    return state
