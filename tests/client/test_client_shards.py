"""Shards of a clip, upscaled apart and joined, are bit for bit the clip of one run."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from client_fakes import FakeTriton, decoded, frame_times, packets, run_client, sum_of_window, write_clip
from requirements import missing

from mst_gan_client.resume import ResumeState
from mst_gan_client.shard import Shard

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "client" / "upscale.py"
COUNT = 50
CUTS = (13, 14, 28, 40)  # frames that begin a shot: inside a shard, and where shards of 14 frames meet


@pytest.fixture(scope="module")
def triton():
    with FakeTriton(network=sum_of_window) as server:
        yield server


def shots(count: int = COUNT) -> list[np.ndarray]:
    """Noise that changes from frame to frame, on another gray after each cut."""
    rng = np.random.default_rng(7)
    grays = [40, 120, 200, 90, 170]
    return [
        (grays[sum(cut <= i for cut in CUTS)] + rng.integers(0, 20, (32, 48, 3))).astype(np.uint8)
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Key frames are 12 frames apart, B-frames between them."""
    return write_clip(tmp_path_factory.mktemp("clip") / "in.mp4", shots(), audio=True)


def upscale(clip, out, triton, *options):
    result = run_client(clip, out, "--url", triton.url, "--segment-frames", 7, *options)
    assert result.exit_code == 0, result.output
    return result


def same(one: Path, other: Path) -> bool:
    return (
        frame_times(one) == frame_times(other)
        and packets(one, "audio") == packets(other, "audio")
        and all((a == b).all() for a, b in zip(decoded(one), decoded(other), strict=True))
    )


@pytest.mark.parametrize(
    ("codec", "count", "options"),
    [
        ("h264", 3, ()),
        ("hevc", 4, ()),
        ("ffv1", 9, ()),  # more shards than segments
        ("h264", 1, ()),
        ("h264", 3, ("--start", "0.3", "--duration", "1.2")),
        ("h264", 2, ("--max-frames", "30")),
    ],
)
def test_joined_shards_are_one_run(tmp_path, clip, triton, codec, count, options):
    once, out = tmp_path / "once.mkv", tmp_path / "out.mkv"
    options = ("--codec", codec, *options)
    upscale(clip, once, triton, *options)
    for number in range(count, 0, -1):  # in any order
        upscale(clip, out, triton, *options, "--shard", f"{number}/{count}")
    result = run_client("join", clip, out)
    assert result.exit_code == 0, result.output
    assert f"frames of {count} shards" in result.output
    assert same(out, once)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["once.mkv", "out.mkv", *(Shard(n, count).path(out).name for n in range(1, count + 1))]
    )


def test_a_shard_that_was_stopped_goes_on(tmp_path, clip, triton, monkeypatch):
    """Also where its first segment ends, and at its very beginning windows look at frames before it."""
    once, out = tmp_path / "once.mp4", tmp_path / "out.mp4"
    upscale(clip, once, triton, "--segment-frames", 1)
    keep = ResumeState.keep
    for number in (1, 2, 3):
        options = ("--segment-frames", 1, "--shard", f"{number}/3")
        kept = 0

        def keep_some(part, segment, record, limit=number):
            nonlocal kept
            if kept == limit:
                raise KeyboardInterrupt
            kept += 1
            keep(part, segment, record)

        monkeypatch.setattr(ResumeState, "keep", keep_some)
        assert run_client(clip, out, "--url", triton.url, *options).exit_code == 130
        monkeypatch.setattr(ResumeState, "keep", keep)
        assert len(list((tmp_path / f"out.mp4.{number}-of-3.shard.part").glob("*.record"))) == number
        upscale(clip, out, triton, *options)
    assert run_client("join", clip, out).exit_code == 0
    assert same(out, once)


@pytest.fixture(scope="module")
def shards(tmp_path_factory, clip, triton):
    """A folder with the two shards of a clip."""
    folder = tmp_path_factory.mktemp("shards")
    for number in (1, 2):
        upscale(clip, folder / "out.mkv", triton, "--shard", f"{number}/2")
    return folder


@pytest.fixture
def out(tmp_path, shards):
    shutil.copytree(shards, tmp_path, dirs_exist_ok=True)
    return tmp_path / "out.mkv"


def test_a_shard_is_missing(clip, out):
    Shard(2, 2).path(out).unlink()
    result = run_client("join", clip, out)
    assert result.exit_code == 1
    assert "found none for 2/2: upscale with --shard 2/2" in result.output
    assert not out.exists()


def test_no_shards(clip, tmp_path):
    result = run_client("join", clip, tmp_path / "none.mkv")
    assert result.exit_code == 1
    assert "found none: upscale with --shard 1/N to N/N first" in result.output


def test_shards_of_two_divisions(clip, out):
    shutil.copy(Shard(1, 2).path(out), Shard(1, 3).path(out))
    result = run_client("join", clip, out)
    assert result.exit_code == 1
    assert "found shards of 2 and shards of 3" in result.output


def test_a_damaged_shard(clip, out):
    path = Shard(2, 2).path(out)
    with zipfile.ZipFile(path) as archive:
        offset = archive.getinfo("000000.segment").header_offset
    data = bytearray(path.read_bytes())
    data[offset + 300] ^= 1
    path.write_bytes(data)
    result = run_client("join", clip, out)
    assert result.exit_code == 1
    assert f"cannot read the shard {path}" in result.output
    assert "delete it, and upscale that shard again" in result.output
    assert not out.exists()


def test_another_clip(tmp_path, out):
    other = write_clip(tmp_path / "other.mp4", shots(20))
    result = run_client("join", other, out)
    assert result.exit_code == 1
    assert "expected the clip that" in result.output


def test_shards_of_different_settings(clip, out, triton):
    Shard(2, 2).path(out).unlink()
    upscale(clip, out, triton, "--shard", "2/2", "--crf", "30")
    result = run_client("join", clip, out)
    assert result.exit_code == 1
    assert "found another encoding" in result.output


def test_shards_of_different_weights(clip, out):
    Shard(2, 2).path(out).unlink()
    with FakeTriton() as other:
        upscale(clip, out, other, "--shard", "2/2")
    result = run_client("join", clip, out)
    assert result.exit_code == 1
    assert "expected shards of the same weights" in result.output


@pytest.mark.parametrize("wrong", ["0/2", "3/2", "1", "a/b", "1/0"])
def test_no_such_shard(tmp_path, clip, wrong):
    result = run_client(clip, tmp_path / "out.mkv", "--shard", wrong)
    assert result.exit_code == 2
    assert "expected a part such as 1/8" in result.output


def test_a_finished_shard_is_kept(clip, out, triton):
    """A scheduler that starts a finished task again does no harm."""
    before = Shard(1, 2).path(out).read_bytes()
    result = run_client(clip, out, "--url", triton.url, "--shard", "1/2")
    assert result.exit_code == 0
    assert f"{Shard(1, 2).path(out)}: is there already" in result.output
    assert Shard(1, 2).path(out).read_bytes() == before


@pytest.mark.parametrize("frames", [0, 1, 7, 8, 50, 129_600])
@pytest.mark.parametrize("count", [1, 2, 3, 16])
def test_shards_meet(frames, count):
    ends = [Shard(number, count).frames(frames, 7) for number in range(1, count + 1)]
    assert ends[0][0] == 0
    assert all(before[1] == after[0] for before, after in pairwise(ends))
    assert frames <= ends[-1][1] < frames + 7


@pytest.mark.slow
def test_gnu_parallel(tmp_path, clip, triton):
    """The line of ``deploy/farm/README.md``, with a process for each shard."""
    if not shutil.which("parallel"):
        missing("PARALLEL", "no GNU parallel found: apt-get install parallel")
    out, once = tmp_path / "out.mkv", tmp_path / "once.mkv"
    upscale(clip, once, triton)
    command = f"{sys.executable} {SCRIPT} --url {triton.url} --segment-frames 7 --shard {{}}/3 {clip} {out}"
    subprocess.run(
        ["parallel", "--jobs", "2", "--halt", "soon,fail=1", command, ":::", "1", "2", "3"], check=True
    )
    assert run_client("join", clip, out).exit_code == 0
    assert same(out, once)
