"""Perceptual loss: distance of two images in the features of a classification network.

The network is VGG19 distilled to a sixteenth of its size (Wang et al. 2020, collaborative distillation). Its
weights are not part of the project: one file, of the layout in which it is published. LPIPS, the reported
metric, uses another network: what is optimized must not also be the score.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.errors import ExportError

WIDTHS = (16, 32, 64, 128, 128)  # channels of its five stages; VGG19's over four
DEPTHS = (2, 2, 4, 4, 1)  # convolutions: to relu5_1
# The layers that were distilled, without the first, whose features are too local.
TAPS = ("conv21", "conv31", "conv41", "conv51")
EPSILON = 1e-3  # added to the squared length of a feature vector; that of a textured place is 1e2 or more


class DistilledVgg(nn.Module):
    """Distance of images: the mean angle between their features, as TecoGAN has it (Chu et al. 2020)."""

    def __init__(self) -> None:
        """Without weights yet; see `load_distilled_vgg`."""
        super().__init__()
        self.conv0 = nn.Conv2d(3, 3, 1)  # from RGB, 0..1, to what VGG19 was fed
        self.convs = nn.ModuleDict()
        before = 3
        for stage, (width, depth) in enumerate(zip(WIDTHS, DEPTHS, strict=True), start=1):
            for index in range(1, depth + 1):
                self.convs[f"conv{stage}{index}"] = nn.Conv2d(before, width, 3)
                before = width

    def _features(self, images: Tensor) -> list[Tensor]:
        """Vectors of about unit length at every tap."""
        x = self.conv0(images)
        features = []
        for name, conv in self.convs.items():
            if name.endswith("1") and name != "conv11":
                x = F.max_pool2d(x, 2)
            x = F.relu(conv(F.pad(x, (1, 1, 1, 1), "reflect")))
            if name in TAPS:
                feature = x.float()
                features.append(feature * torch.rsqrt(feature.square().sum(1, keepdim=True) + EPSILON))
        return features

    def forward(self, images: Tensor, truth: Tensor) -> Tensor:
        """Mean distance, 0..1, of (N, 3, H, W) float32 RGB images, nominally 0..1, sides at least 32."""
        with torch.no_grad():
            expected = self._features(truth)
        distances = [
            (a - b).square().sum(1).mean() / 2 for a, b in zip(self._features(images), expected, strict=True)
        ]
        return torch.stack(distances).mean()


def load_distilled_vgg(path: Path) -> DistilledVgg:
    """Read the published file; in evaluation mode, on the CPU.

    Raises:
        ExportError: it is missing, or holds something else.
    """
    expected = "expected weights of VGG19 distilled to a sixteenth"
    if not path.is_file():
        raise ExportError(f"{expected} at {path}, found no file; pass --perceptual FILE")
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as err:  # unpickling fails in as many ways as there are broken files
        raise ExportError(
            f"{expected} in {path}, found no PyTorch state dict ({type(err).__name__})"
        ) from err
    state = stored.get("model", stored) if isinstance(stored, dict) else {}
    network = DistilledVgg()
    # The published file also holds layers that widen features to VGG19's own; only distilling needs them.
    renamed = {
        name if name.startswith("conv0.") else f"convs.{name}": value
        for name, value in state.items()
        if isinstance(name, str) and "_aux." not in name
    }
    try:
        network.load_state_dict(renamed)
    except (RuntimeError, AttributeError, TypeError) as err:
        raise ExportError(
            f"{expected} in {path}, found other keys or shapes: {str(err).splitlines()[-1].strip()}; "
            "pass the published file"
        ) from err
    return network.eval().requires_grad_(False)
