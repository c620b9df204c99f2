"""Damaged files of every container: each ends in a file or in one line, and the process lives."""

from __future__ import annotations

import struct

import pytest
from client_fakes import FakeTriton, decoded, run_client
from ffmpeg import FILM, ffmpeg
from fuzz import KINDS, TAGGED, fuzz

pytestmark = pytest.mark.slow

FILES = 4 * len((*KINDS, *TAGGED))
SEED = 7


def test_damaged_files(tmp_path, matrix_cell):
    record = matrix_cell("Damaged files", f"seed {SEED}", "all kinds")
    endings = fuzz(SEED, FILES, tmp_path)
    assert set(endings) <= {"done", "refused"}, endings
    assert sum(endings.values()) == FILES
    assert endings["done"] and endings["refused"]
    record(", ".join(f"{count} {how}" for how, count in sorted(endings.items())))


@pytest.mark.parametrize(
    ("rate", "scale"),
    [(25, 1526726657), (1, 2**32 - 1), (2**32 - 1, 1), (2**32 - 1, 2**32 - 2), (0, 1), (1, 0), (0, 0)],
)
def test_rates_that_no_player_could_show(tmp_path, rate, scale):
    """The numbers of an AVI's header may be any: frames get times that are close, or there is one line."""
    clip, out = ffmpeg(*FILM, "-c:v", "mpeg4", tmp_path / "in.avi"), tmp_path / "out.mkv"
    header = bytearray(clip.read_bytes())
    place = header.index(b"strh") + 8 + 20  # dwScale, dwRate
    header[place : place + 8] = struct.pack("<II", scale, rate)
    clip.write_bytes(header)
    frames = len(decoded(clip))
    with FakeTriton() as triton:
        result = run_client(clip, out, "--url", triton.url)
    if result.exit_code:
        assert isinstance(result.exception, SystemExit), result.exception
        assert result.output.splitlines()[-1].startswith("Error: ")
    else:
        assert len(decoded(out)) == frames
