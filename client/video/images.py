"""Segments in, PNG files out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import av
from av.packet import Packet

from ..errors import UpscaleError
from .source import Source, file_url
from .stills import StillTags, tags_of
from .times import Times

PNG_SUFFIX = ".png"


def writes_images(out: Path, source: Source) -> bool:
    """Whether an output is images: a PNG file, or a folder for the images of a folder."""
    return out.suffix.lower() == PNG_SUFFIX or (source.path.is_dir() and not out.suffix)


class Images:
    """One still image, or a folder of them under the names that they came with.

    Args:
        out: The file or folder to write.
        source: The image or the folder of images that the frames came from.
    """

    def __init__(self, out: Path, source: Source) -> None:
        self._out, self._source = out, source

    def rehearse(self, segment: Path) -> None:
        """Nothing can be refused: every packet of a segment is a PNG file."""

    def write(self, segments: Sequence[Path], times: Times, is_whole: bool) -> None:
        """Write the files.

        Raises:
            UpscaleError: There are more or fewer frames than there should be.
        """
        if self._out.suffix:
            paths = [self._out]
            originals = self._source.files() if self._source.is_stills else []
        else:
            self._out.mkdir(exist_ok=True)
            found = self._source.files()
            numbers = (round(pts * times.time_base * self._source.rate) for pts in times.pts)
            originals = [found[number] for number in numbers]
            paths = [self._out / f"{original.stem}{PNG_SUFFIX}" for original in originals]
        count = 0
        for packet in _packets(segments):
            if count < len(paths):
                tags = tags_of(originals[count]) if count < len(originals) else StillTags()
                paths[count].write_bytes(tags.in_png(bytes(packet)))
            count += 1
        if count != len(paths):
            raise UpscaleError(f"expected {len(paths)} images of {self._source.path}, found {count}")


def _packets(segments: Sequence[Path]) -> Iterator[Packet[Any]]:
    for path in segments:
        with av.open(file_url(path)) as segment:
            yield from (packet for packet in segment.demux(video=0) if packet.size)
