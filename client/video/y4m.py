"""y4m through standard input, standard output and named pipes, with what FFmpeg leaves out of it."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

Y4M_FORMAT = "yuv4mpegpipe"
STDIN = 0
FRAME_START = b"FRAME\n"  # before the pixels of each frame


class Y4mInput:
    """Standard input or a named pipe, whose length is counted."""

    name = "pipe"

    def __init__(self) -> None:
        self._descriptor = STDIN
        self.length = 0
        """Bytes read so far."""
        self.header = b""
        """The first line."""

    def open(self, path: Path) -> None:
        """Read from a named pipe instead of standard input."""
        self._descriptor = os.open(path, os.O_RDONLY)

    def read(self, size: int) -> bytes:
        """What there is, at most so many bytes; nothing at the end."""
        data = os.read(self._descriptor, size)
        if not self.header.endswith(b"\n"):
            line, end, _ = data.partition(b"\n")
            self.header += line + end
        self.length += len(data)
        return data


def rest_of_frame(source: Path | Y4mInput, frames: int, frame_bytes: int) -> int:
    """Bytes of a last frame that is not whole, which FFmpeg takes for the end.

    Args:
        source: A y4m file, or standard input after its last frame.
        frames: That were whole.
        frame_bytes: Bytes of the pixels of one.
    """
    if isinstance(source, Y4mInput):
        length, header = source.length, source.header
    else:
        with source.open("rb") as file:
            header = file.readline()
        length = source.stat().st_size
    return max(0, length - len(header) - frames * (len(FRAME_START) + frame_bytes))


class Y4mOutput:
    """A pipe to write to, with the shape of pixels in the header, which FFmpeg's muxer takes from nowhere."""

    name = "pipe"

    def __init__(self, file: BinaryIO, aspect: Fraction | None) -> None:
        self._file, self._aspect = file, aspect
        self.failure: OSError | None = None
        """What PyAV hides when it writes."""

    def write(self, data: bytes) -> int:
        """Write bytes; the first hold the header."""
        written = len(data)
        if self._aspect:
            data = bytes(data).replace(b" A0:0", b" A%d:%d" % self._aspect.as_integer_ratio(), 1)
            self._aspect = None
        try:
            self._file.write(data)
        except OSError as err:
            self.failure = err
            raise
        return written
