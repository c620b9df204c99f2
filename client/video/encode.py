"""Hr frames in, one encoded segment file out."""

from __future__ import annotations

import os
import secrets
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import av
from av.container import OutputContainer
from av.packet import Packet
from av.video.reformatter import ColorRange
from av.video.stream import VideoStream

from ..durable import rename
from ..errors import UpscaleError
from ..frames.windows import Image
from .color import RGB, frame_from_rgb
from .picture import Picture
from .source import PIPE, file_url
from .y4m import Y4M_FORMAT, Y4mOutput

os.environ.setdefault("SVT_LOG", "1")  # errors only; SVT-AV1 prints a banner per encoder otherwise


PIPE_BYTES = 1 << 20  # written at a time


@dataclass(frozen=True)
class Codec:
    """An encoder and what we ask of it when the user does not say."""

    encoder: str
    pix_fmt: str
    crf: int | None = None
    """None: the encoder has no quality scale."""
    preset: str | None = None
    options: tuple[tuple[str, str], ...] = ()
    segment_format: str = "mov"
    """A container that holds the codec and any time base exactly."""
    reorder: int = 0
    """Frames by which decoding runs ahead of display, in every preset."""


def x264_options() -> tuple[tuple[str, str], ...]:
    """Options that make libx264 give the same bytes for the same frames.

    Its AVX-512 code for macroblock trees reads memory it has not written: with it, two runs over the
    same frames differed in most of them, with AVX2 in none.
    """
    try:
        has_avx512 = "avx512f" in Path("/proc/cpuinfo").read_text()
    except OSError:
        has_avx512 = False
    return (("x264-params", "asm=AVX2"),) if has_avx512 else ()


CODECS = {
    # Two steps of crf below medium's usual 18: the same PSNR for half the time and a third more bytes
    # (measured on 60 frames of 1280x720), because the server may share these cores.
    "h264": Codec("libx264", "yuv420p", 16, "veryfast", x264_options(), reorder=2),
    "hevc": Codec("libx265", "yuv420p", 20, "medium", (("x265-params", "log-level=error"),), reorder=2),
    "av1": Codec("libsvtav1", "yuv420p", 28, "8", segment_format="mp4"),
    "ffv1": Codec("ffv1", "yuv444p", options=(("level", "3"), ("g", "1")), segment_format="nut"),
    "prores": Codec("prores_ks", "yuv422p10le"),
}
DEFAULT_CODEC = "h264"


@dataclass(frozen=True)
class Encoding:
    """How hr frames are encoded."""

    codec: Codec
    pix_fmt: str
    options: tuple[tuple[str, str], ...]
    """All the encoder's options, the codec's own among them."""


PNG = Encoding(Codec("png", "rgb24"), "rgb24", ())
"""How images are written; every packet of it is a PNG file."""


def encoding_from_options(codec: str, crf: int | None, preset: str | None, pix_fmt: str | None) -> Encoding:
    """Fill in what the user left open; refuse what the codec does not know."""
    known = CODECS[codec]
    try:
        formats = {fmt.name for fmt in av.Codec(known.encoder, "w").video_formats or ()}
    except av.codec.codec.UnknownCodecError as err:
        raise UpscaleError(f"this FFmpeg has no {known.encoder}: choose another --codec") from err
    if pix_fmt is not None and formats and pix_fmt not in formats:
        raise UpscaleError(
            f"expected a pixel format of {codec}, found {pix_fmt}: {', '.join(sorted(formats))}"
        )
    options = dict(known.options)
    for name, given, default in (("crf", crf, known.crf), ("preset", preset, known.preset)):
        if default is not None:
            options[name] = str(default if given is None else given)
        elif given is not None:
            raise UpscaleError(f"{codec} has no {name}: leave --{name} out")
    return Encoding(known, pix_fmt or known.pix_fmt, tuple(options.items()))


def tag_stream(stream: VideoStream, picture: Picture) -> None:
    """Say of an output stream how its picture is to be shown."""
    if picture.sample_aspect_ratio:
        stream.codec_context.sample_aspect_ratio = picture.sample_aspect_ratio
    stream.color_range = ColorRange.JPEG if stream.format.is_rgb else picture.color.range
    stream.color_primaries = picture.color.primaries
    stream.color_trc = picture.color.transfer
    stream.colorspace = RGB if stream.format.is_rgb else picture.color.matrix


_OPENING = threading.Lock()


@contextmanager
def same_scheduling() -> Iterator[None]:
    """Undo what a library does to the scheduling of this process's threads.

    SVT-AV1, run as root, makes them real-time (``SCHED_FIFO`` 99): a server on the same cores would starve.
    One encoder is opened at a time, or a second one would take that for the process's own scheduling.
    """
    if not hasattr(os, "sched_getscheduler"):  # not Linux
        yield
        return
    with _OPENING:
        policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
        try:
            yield
        finally:
            for thread in os.listdir("/proc/self/task"):
                with suppress(OSError):  # it has ended
                    os.sched_setscheduler(int(thread), policy, parameters)


def encode(
    container: OutputContainer, hr_frames: Iterable[Image], picture: Picture, encoding: Encoding
) -> int:
    """Encode frames into an empty container, and return how many.

    The encoder only counts frames: frame i has time i / rate.

    Args:
        container: To write to.
        hr_frames: (H, W, 3) uint8 RGB each.
        picture: Of the hr clip.
        encoding: How to encode.
    """
    encoder, settings = encoding.codec.encoder, dict(encoding.options)
    stream = cast(VideoStream, container.add_stream(encoder, rate=picture.rate, options=settings))
    height, width = picture.size
    stream.width, stream.height, stream.pix_fmt = width, height, encoding.pix_fmt
    stream.codec_context.time_base = 1 / picture.rate
    tag_stream(stream, picture)
    count = written = 0

    def mux(packets: list[Packet[VideoStream]]) -> None:
        nonlocal written
        for packet in packets:
            # libx265 leaves the decoding times of clips of one or two frames uninitialized.
            packet.dts = written - encoding.codec.reorder
            written += 1
            container.mux(packet)

    try:
        for count, hr in enumerate(hr_frames, 1):
            frame = frame_from_rgb(hr, picture.size, encoding.pix_fmt, picture.color)
            frame.pts, frame.time_base = count - 1, 1 / picture.rate
            with same_scheduling() if count == 1 else nullcontext():  # the first one opens the encoder
                mux(stream.encode(frame))
    finally:  # also when frames stop coming: what is there should be watchable
        mux(stream.encode(None))
    return count


def write_segment(path: Path, hr_frames: Iterable[Image], picture: Picture, encoding: Encoding) -> int:
    """Encode frames into a file that appears only when it is complete.

    The times of the clip, regular or not, are given back when segments are joined, so no encoder can
    round them.

    Args:
        path: Of the segment; a file ``.unfinished`` beside it is written first, under a name that no other
            process has: one that stood still and was taken for dead may come back and write on.
        hr_frames: (H, W, 3) uint8 RGB each; at least one.
        picture: Of the hr clip.
        encoding: How to encode.

    Returns:
        The number of frames written.
    """
    unfinished = path.with_suffix(f".{secrets.token_hex(8)}.unfinished")
    with av.open(file_url(unfinished), "w", format=encoding.codec.segment_format) as container:
        count = encode(container, hr_frames, picture, encoding)
    rename(unfinished, path)
    return count


def write_y4m(out: Path, hr_frames: Iterable[Image], picture: Picture, pix_fmt: str) -> int:
    """Write frames to standard output or a named pipe as y4m, which knows one frame rate and no times."""
    encoding = Encoding(Codec("rawvideo", pix_fmt), pix_fmt, ())
    deep = {"strict": "-1"}  # y4m of more than 8 bits is an extension
    with ExitStack() as files:
        file = sys.stdout.buffer if out == PIPE else files.enter_context(out.open("wb"))
        pipe = Y4mOutput(file, picture.sample_aspect_ratio)
        try:
            with av.open(
                pipe, "w", format=Y4M_FORMAT, container_options=deep, buffer_size=PIPE_BYTES
            ) as container:
                return encode(container, hr_frames, picture, encoding)
        except av.FFmpegError:
            if pipe.failure:
                raise pipe.failure from None
            raise
