"""Stage 3, pixel-shuffle postprocess: the hr frame's sub-pixels in, its pixels out."""

from __future__ import annotations

from torch import Tensor, nn

from export.spec import CHANNELS, SCALE


class PixelShuffle(nn.Module):
    """A rearrangement of bytes, in two steps that ONNX Runtime's CPU provider is fast at.

    It transposes two axes by runs of bytes, more of them one byte at a time. DepthToSpace and a transpose to
    channels last take 2.5 times as long at 320x180, the six axes at once 8 times.
    """

    def forward(self, subpixels: Tensor) -> Tensor:
        """(N, 48, H, W) -> (N, 4H, 4W, 3); any type."""
        n, _, h, w = subpixels.shape
        split = subpixels.reshape(n, CHANNELS, SCALE, SCALE, h, w)  # n, c, y, x, h, w
        rows = split.permute(0, 4, 2, 3, 1, 5).reshape(n, h, SCALE, SCALE * CHANNELS, w)  # n, h, y, (x, c), w
        pixels = rows.permute(0, 1, 2, 4, 3)  # n, h, y, w, (x, c)
        return pixels.reshape(n, SCALE * h, SCALE * w, CHANNELS)
