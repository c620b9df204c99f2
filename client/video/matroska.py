"""The shape of pixels in a Matroska file, which PyAV has no way to hand to FFmpeg's muxer.

The muxer writes the track's name with spaces behind it; their place is then taken by the elements that say
the shape, so that nothing else in the file moves.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

from ..errors import UpscaleError
from ..frames.windows import Size

ROOM = " " * 40
"""To be added to the title of the picture's stream before the header is written."""

# Elements by their numbers (RFC 9559).
SEGMENT, TRACKS, TRACK_ENTRY = b"\x18\x53\x80\x67", b"\x16\x54\xae\x6b", b"\xae"
CRC_32, VOID, TRACK_TYPE, NAME, VIDEO = b"\xbf", b"\xec", b"\x83", b"\x53\x6e", b"\xe0"
DISPLAY_WIDTH, DISPLAY_HEIGHT, DISPLAY_UNIT = b"\x54\xb0", b"\x54\xba", b"\x54\xb2"
PICTURE, ASPECT_RATIO = b"\x01", b"\x03"  # values of TRACK_TYPE and DISPLAY_UNIT

HEADER_BYTES = 1 << 22  # tracks lie within: attachments, which may be large, come after them


def set_aspect(path: Path, size: Size, aspect: Fraction, title: str) -> None:
    """Write the shape of pixels into a file whose picture's title has room behind it.

    Args:
        path: The file.
        size: (height, width) of its picture.
        aspect: Width of a pixel over its height.
        title: What the title should be.

    Raises:
        UpscaleError: The file is not as FFmpeg writes it.
    """
    shown = aspect * size[1] / size[0]
    parts = ((DISPLAY_WIDTH, shown.numerator), (DISPLAY_HEIGHT, shown.denominator))
    shape = b"".join(_element(name, number.to_bytes(4, "big")) for name, number in parts)
    shape += _element(DISPLAY_UNIT, ASPECT_RATIO)
    with path.open("r+b") as file:
        data = file.read(HEADER_BYTES)
        try:
            start, end = _find(data, 0, len(data), (SEGMENT, TRACKS))
            first, last = _find(data, start, end, (TRACK_ENTRY,), _is_picture)
            entry = _with_shape(data[first:last], shape, title)
            tracks = data[start:first] + entry + data[last:end]
            if tracks.startswith(CRC_32):
                tracks = tracks[:2] + zlib.crc32(tracks[6:]).to_bytes(4, "little") + tracks[6:]
        except (LookupError, ValueError) as err:
            raise UpscaleError(f"expected room for the shape of pixels in {path}, found none") from err
        file.seek(start)
        file.write(tracks)


def _with_shape(entry: bytes, shape: bytes, title: str) -> bytes:
    """A track entry of the same length with another title and more about its video."""
    found = b""
    for name, start, first, last in _children(entry, 0, len(entry)):
        if name == NAME:
            found += _element(NAME, title.encode()) if title else b""
        elif name == VIDEO:
            found += _element(VIDEO, entry[first:last] + shape)
        else:
            found += entry[start:last]
    rest = len(entry) - len(found)
    return found + _element(VOID, bytes(rest - 2))


def _is_picture(entry: bytes) -> bool:
    return any(
        name == TRACK_TYPE and entry[first:last] == PICTURE
        for name, _, first, last in _children(entry, 0, len(entry))
    )


def _find(
    data: bytes,
    start: int,
    end: int,
    names: tuple[bytes, ...],
    is_wanted: Callable[[bytes], bool] = lambda content: True,
) -> tuple[int, int]:
    """Where the content of an element lies, by the names on the way to it."""
    for name, _, first, last in _children(data, start, end):
        if name == names[0] and is_wanted(data[first:last]):
            return (first, last) if len(names) == 1 else _find(data, first, last, names[1:])
    raise LookupError(names[0])


def _children(data: bytes, start: int, end: int) -> Iterator[tuple[bytes, int, int, int]]:
    """Name, start, start of content and end of each element in a row of them."""
    while start < end:
        name_end = start + _length(data[start])
        size_end = name_end + _length(data[name_end])
        width = size_end - name_end
        size = int.from_bytes(data[name_end:size_end], "big") - (1 << 7 * width)
        is_open = size == (1 << 7 * width) - 1  # to the end of what it lies in
        last = end if is_open else min(end, size_end + size)
        yield data[start:name_end], start, size_end, last
        start = last


def _length(byte: int) -> int:
    """Bytes of a number of variable length, by its first."""
    if not byte:
        raise ValueError("no number of Matroska's")
    return 9 - byte.bit_length()


def _element(name: bytes, content: bytes) -> bytes:
    """An element of at most 16 kB."""
    size = len(content)
    return name + (bytes([0x80 | size]) if size < 127 else (0x4000 | size).to_bytes(2, "big")) + content
