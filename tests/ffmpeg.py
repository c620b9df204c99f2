"""Inputs of every kind, made with FFmpeg's own test sources by the binary that imageio-ffmpeg carries."""

from __future__ import annotations

import subprocess
from pathlib import Path

import imageio_ffmpeg

FILM = ("-f", "lavfi", "-i", "testsrc2=size=64x48:rate=25:duration=0.6")
TONE = ("-f", "lavfi", "-i", "sine=frequency=440:sample_rate=44100:duration=0.6")
H264 = ("-c:v", "libx264", "-preset", "ultrafast", "-pix_fmt", "yuv420p", "-x264-params", "bframes=2")


def ffmpeg(*arguments: object) -> Path:
    """Run FFmpeg; the last argument is the file it writes, and is returned."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return Path(str(arguments[-1]))


def insert_box(movie: Path, parents: tuple[bytes, ...], box: bytes) -> None:
    """Append a box to one in an MP4 file, found by the names on the way to it; its movie data comes first."""
    data = bytearray(movie.read_bytes())
    places, start = [], 0
    for name in parents:
        start = data.index(name, start) - 4
        places.append(start)
        start += 8
    end = places[-1] + int.from_bytes(data[places[-1] : places[-1] + 4], "big")
    data[end:end] = box
    for place in places:
        size = int.from_bytes(data[place : place + 4], "big") + len(box)
        data[place : place + 4] = size.to_bytes(4, "big")
    movie.write_bytes(data)
