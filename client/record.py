"""What a run knows of its frames and of its input: enough to go on later as if it had never stopped."""

from __future__ import annotations

import hashlib
import json
import secrets
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from .errors import UpscaleError
from .frames.windows import Image
from .video.source import Source

SAMPLE_BYTES = 64 << 10
SAMPLES = 64  # of a file, evenly spread from its first byte to its last: 4 MB, however large it is
SAMPLES_OF_AN_IMAGE = 4  # of each image of a folder


def checksum(image: Image) -> int:
    """CRC-32 of an image's bytes."""
    return zlib.crc32(np.ascontiguousarray(image).data)


@dataclass
class Record:
    """Facts about the frames of a run in their order, one entry of each list a frame."""

    pts: list[int] = field(default_factory=list)
    """Times, in ticks of the clip."""
    checksums: list[int] = field(default_factory=list)
    """CRC-32 of the decoded pictures."""
    damaged: list[int] = field(default_factory=list)
    """Frames up to this one that came out of the decoder, but not whole."""
    refused: list[int] = field(default_factory=list)
    """Packets before it that could not be decoded."""
    cuts: list[int] = field(default_factory=list)
    """Times of the frames that begin a new shot; not one a frame."""

    def add(self, pts: int, image: Image, damaged: int, refused: int) -> None:
        """Note one more frame."""
        self.pts.append(pts)
        self.checksums.append(checksum(image))
        self.damaged.append(damaged)
        self.refused.append(refused)

    def has(self, index: int, pts: int, image: Image) -> bool:
        """Whether a frame is what it was."""
        return (pts, checksum(image)) == (self.pts[index], self.checksums[index])

    def check(self, index: int, pts: int, image: Image, path: Path) -> None:
        """Compare a frame that was decoded again with what it was.

        Raises:
            UpscaleError: It is another.
        """
        if not self.has(index, pts, image):
            raise UpscaleError(
                f"expected frame {index + 1} of {path} as it was when the unfinished run read it, found "
                "another picture or time: start over with --restart"
            )

    def part(self, start: int, end: int) -> Record:
        """What is known of the frames from ``start`` up to ``end``."""
        times = self.pts[start:end]
        cuts = [pts for pts in self.cuts if times and times[0] <= pts <= times[-1]]
        checksums, damaged, refused = (
            values[start:end] for values in (self.checksums, self.damaged, self.refused)
        )
        return Record(times, checksums, damaged, refused, cuts)

    def to_json(self) -> str:
        """Give the text that ``from_json`` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, texts: Iterable[str]) -> Record:
        """Join what was kept of the parts of a clip, in order."""
        whole = cls()
        for text in texts:
            for name, values in json.loads(text).items():
                getattr(whole, name).extend(values)
        return whole


NOTHING = Record()
"""Nothing is known of any frame."""


def file_stamps(source: Source) -> list[tuple[str, int, int]]:
    """Name, size in bytes and time of change in ns of each file; empty for standard input."""
    if source.is_pipe:
        return []
    return [(path.name, (stat := path.stat()).st_size, stat.st_mtime_ns) for path in source.files()]


def input_identity(source: Source) -> str:
    """Tell one input from another without reading all of it.

    Size, time of change, and blocks of each file, evenly spread, make up the hash; nobody knows what
    standard input will bring.
    """
    if source.is_pipe:
        return secrets.token_hex(16)
    files = source.files()
    is_folder = files != [source.path]
    digest = hashlib.blake2b(digest_size=16)
    for path, (name, size, changed_ns) in zip(files, file_stamps(source), strict=True):
        digest.update(repr((name if is_folder else "", size, changed_ns)).encode("utf-8", "backslashreplace"))
        count = SAMPLES_OF_AN_IMAGE if is_folder else SAMPLES
        last = max(0, size - SAMPLE_BYTES)
        with path.open("rb") as file:
            for start in sorted({last * number // (count - 1) for number in range(count)}):
                file.seek(start)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


class InputGuard:
    """Notices an input that is replaced, written to or removed while it is read.

    Args:
        source: The input, before it is opened.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self.identity = input_identity(source)
        self._stamps = file_stamps(source)

    def check(self, closely: bool = False) -> None:
        """Compare it with what it was.

        Args:
            closely: Read the samples again; otherwise names, sizes and times have to do.

        Raises:
            UpscaleError: It has changed.
        """
        if self._source.is_pipe:
            return
        try:
            is_same = file_stamps(self._source) == self._stamps
            if is_same and closely:
                is_same = input_identity(self._source) == self.identity
        except FileNotFoundError:
            is_same = False
        if not is_same:
            raise UpscaleError(
                f"expected {self._source.path} to stay as it is, found that it changed while it was read: "
                "put it back, or start over with --restart"
            )
