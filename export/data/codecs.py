"""What a codec leaves of a sequence: encoded as a file in memory, and decoded again."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from fractions import Fraction
from typing import cast

import av
import numpy as np
from av import VideoStream
from av.container import InputContainer
from numpy.typing import NDArray

from export.errors import ExportError
from mst_gan_client.video.encode import same_scheduling

Frames = NDArray[np.uint8]
"""(T, h, w, 3) RGB."""

LEAST_SIDE = 64  # pixels; AV1's encoder takes no smaller ones, smaller frames are coded with a margin
FPS = 25


@dataclass(frozen=True)
class Coding:
    """One encoder and its settings."""

    encoder: str
    """FFmpeg's name."""
    options: dict[str, str] = field(default_factory=dict)
    """FFmpeg's options of this encoder."""
    gop: int = 48
    """Frames from key frame to key frame, at most."""
    pix_fmt: str = "yuv420p"

    def __str__(self) -> str:
        """Encoder and settings, for errors."""
        settings = " ".join(f"{name} {value}" for name, value in self.options.items())
        return f"{self.encoder} {settings} GOP {self.gop}"


def x264(crf: int) -> Coding:
    """H.264 as most files have it: preset medium, GOP 48."""
    return Coding("libx264", {"preset": "medium", "crf": str(crf)})


def transcode(frames: Frames, coding: Coding) -> Frames:
    """The frames after ``coding``, in 4:2:0.

    One thread, so that the same frames give the same answer with the same version of an encoder; except for
    x265, whose answers differ by a little from time to time.

    Args:
        frames: (T, h, w, 3) uint8 RGB; any size.
        coding: encoder and settings.

    Returns:
        (T, h, w, 3) uint8 RGB.

    Raises:
        ExportError: the encoder refused, or frames were lost.
    """
    count, height, width = frames.shape[:3]
    below, right = (max(LEAST_SIDE, side + side % 2) - side for side in (height, width))
    file = io.BytesIO()
    try:
        with av.open(file, "w", format="matroska") as output:
            stream = cast(
                VideoStream, output.add_stream(coding.encoder, rate=FPS, options=dict(coding.options))
            )
            stream.height, stream.width, stream.pix_fmt = height + below, width + right, coding.pix_fmt
            stream.time_base = Fraction(1, FPS)
            stream.codec_context.gop_size = coding.gop
            stream.codec_context.thread_count = 1
            with same_scheduling():
                stream.codec_context.open()
            for index, frame in enumerate(frames):
                padded = np.pad(frame, ((0, below), (0, right), (0, 0)), "edge")
                picture = av.VideoFrame.from_ndarray(padded, "rgb24")
                picture.pts = index
                output.mux(stream.encode(picture))
            output.mux(stream.encode(None))
        file.seek(0)
        with av.open(file) as coded:
            pictures = cast(InputContainer, coded).decode(video=0)
            decoded = [picture.to_ndarray(format="rgb24")[:height, :width] for picture in pictures]
    except av.FFmpegError as err:
        raise ExportError(f"expected {coding} to code {width}x{height}, found {err}") from err
    if len(decoded) != count:
        raise ExportError(f"expected {count} frames back from {coding}, found {len(decoded)}")
    return np.stack(decoded)
