"""Whether a file is cut off, as a download that broke off: told by its header, before the end is reached."""

from __future__ import annotations

from pathlib import Path

from av.container import InputContainer
from av.video.stream import VideoStream

RIFF_BYTES = 12  # "RIFF", the size of what follows the first 8, "AVI "


def what_is_cut_off(path: Path, container: InputContainer, stream: VideoStream) -> str | None:
    """How much of the picture lies beyond the end of the file; nothing where the header does not tell.

    Args:
        path: The file.
        container: The same, open.
        stream: With the picture.
    """
    if not path.is_file():
        return None
    size, names = path.stat().st_size, container.format.name.split(",")
    if "mov" in names:
        entries = list(stream.index_entries)
        beyond = sum(entry.pos + entry.size > size for entry in entries)
        return f"ends before the last {beyond} of its {len(entries)} frames" if beyond else None
    if "avi" in names:
        with path.open("rb") as file:
            header = file.read(RIFF_BYTES)
        promised = int.from_bytes(header[4:8], "little") + 8
        if header[:4] == b"RIFF" and promised > size + 1:  # a last byte may be padding
            return f"ends after {size} of {promised} bytes"
    return None
