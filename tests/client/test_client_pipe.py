"""y4m on standard input and output."""

from __future__ import annotations

import io
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from client_fakes import decoded, frame_times, nearest, pictures, run_client, write_clip

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "client" / "upscale.py"
IMAGES = pictures(20)


def client(triton, src, dst, *options, data=b""):
    command = [sys.executable, SCRIPT, src, dst, "--url", triton.url, *options]
    return subprocess.run(list(map(str, command)), input=data, capture_output=True, timeout=60)


def y4m(images, rate=Fraction(30000, 1001), pix_fmt="yuv444p"):
    file = io.BytesIO()
    with av.open(file, "w", format="yuv4mpegpipe") as container:
        stream = container.add_stream("rawvideo", rate=rate)
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt = pix_fmt
        for index, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image).reformat(format=pix_fmt)
            frame.pts, frame.time_base = index, 1 / rate
            container.mux(stream.encode(frame))
    return file.getvalue()


def test_from_input_to_output(triton):
    done = client(triton, "-", "-", "--pix-fmt", "yuv444p", data=y4m(IMAGES))
    assert done.returncode == 0, done.stderr
    assert b"20 frames, 48x32 -> 192x128" in done.stderr
    with av.open(io.BytesIO(done.stdout), format="yuv4mpegpipe") as container:
        stream = container.streams.video[0]
        assert stream.average_rate == Fraction(30000, 1001)
        frames = [frame.to_ndarray(format="rgb24").astype(int) for frame in container.decode(stream)]
    assert len(frames) == 20
    for frame, image in zip(frames, IMAGES, strict=True):
        assert np.abs(frame - nearest(image[None, None].repeat(3, 1))[0]).max() <= 6


def test_from_input_to_a_file(tmp_path, triton):
    out = tmp_path / "out.mp4"
    done = client(triton, "-", out, "--segment-frames", 7, data=y4m(IMAGES))
    assert done.returncode == 0, done.stderr
    assert frame_times(out) == [Fraction(n * 1001, 30000) for n in range(20)]
    assert len(decoded(out)) == 20


def test_from_a_file_to_output(tmp_path, triton):
    clip = write_clip(tmp_path / "in.mp4", IMAGES, audio=True)
    done = client(triton, clip, "-")
    assert done.returncode == 0, done.stderr
    with av.open(io.BytesIO(done.stdout), format="yuv4mpegpipe") as container:
        assert len(list(container.decode(video=0))) == 20


def test_uneven_times_are_named(tmp_path, triton):
    clip = write_clip(tmp_path / "in.mp4", pictures(3), pts=[0, 1, 5], time_base=Fraction(1, 50))
    assert b"not evenly spaced, which y4m cannot say" in client(triton, clip, "-").stderr


def test_no_y4m_on_input(tmp_path, triton):
    done = client(triton, "-", tmp_path / "out.mp4", data=b"not y4m")
    assert done.returncode == 1
    assert done.stderr.decode().splitlines()[-1].startswith("Error: expected a video, found -")


def test_a_reader_that_goes_away(tmp_path, triton):
    clip = write_clip(tmp_path / "in.mkv", pictures(60, 64, 96), codec="ffv1", pix_fmt="bgr0")
    command = [sys.executable, SCRIPT, clip, "-", "--url", triton.url]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(1000)
    process.stdout.close()
    errors = process.stderr.read().decode()
    assert process.wait(30) == 1
    assert "cannot write it (Broken pipe)" in errors.splitlines()[-1]


@pytest.mark.parametrize("option", [("--json",), ("--dry-run",), ("--codec", "hevc")])
def test_options_that_a_pipe_does_not_have(tmp_path, triton, option):
    clip = write_clip(tmp_path / "in.mp4", pictures(2))
    result = run_client(clip, "-", "--url", triton.url, *option)
    assert result.exit_code == 1
    assert "expected one clip for y4m on standard output, without" in result.output


@pytest.mark.parametrize("left", [1, 100, 32 * 48 * 3 - 1])
def test_input_that_ends_within_a_frame(tmp_path, triton, left):
    """The program that feeds us has died."""
    data = y4m(IMAGES)
    frame = (len(data) - data.index(b"\n") - 1) // 20
    cut = data[: len(data) - frame + left]
    done = client(triton, "-", tmp_path / "out.mp4", data=cut)
    assert done.returncode == 1
    assert b"ends in the middle of frame 20: get it whole, or pass --allow-damage" in done.stderr
    again = ("--allow-damage", "--restart")
    assert client(triton, "-", tmp_path / "out.mp4", *again, data=cut).returncode == 0
    assert len(decoded(tmp_path / "out.mp4")) == 19
    (tmp_path / "in.y4m").write_bytes(cut)
    result = run_client(tmp_path / "in.y4m", tmp_path / "other.mp4", "--url", triton.url)
    assert result.exit_code == 1
    assert "ends in the middle of frame 20" in result.output
