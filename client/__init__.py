"""Client of a Triton server that serves the MST-GAN ensemble: video in, video four times as large out.

The command is ``mst-gan-upscale``; programs use ``Upscaler``::

    with Upscaler("localhost:8001") as upscaler:
        for hr in upscaler.upscale(frames):  # (H, W, 3) uint8 RGB in, four times as large out
            ...
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import FrameError, ServerError, UpscaleError

if TYPE_CHECKING:
    from .serving.security import Security
    from .upscaler import Upscaler

__all__ = ["FrameError", "Security", "ServerError", "UpscaleError", "Upscaler"]


def __getattr__(name: str) -> Any:
    """Import what needs gRPC and FFmpeg at its first use, so that importing the package is quick."""
    if name == "Upscaler":
        from .upscaler import Upscaler

        return Upscaler
    if name == "Security":
        from .serving.security import Security

        return Security
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
