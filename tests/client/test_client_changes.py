"""Clips that change in the middle: size, pixel format, colors. They go on like their first frame, exactly."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import grpc
import numpy as np
import pytest
from client_fakes import LOSSLESS, FakeTriton, decoded, frame_times, run_client
from ffmpeg import ffmpeg

pytestmark = pytest.mark.slow

COUNT = 6  # frames of each part
X264 = ("-c:v", "libx264", "-qp", "0", "-preset", "ultrafast")
VP8 = ("-c:v", "libvpx", "-b:v", "4M", "-qmin", "0", "-qmax", "4", "-deadline", "realtime", "-cpu-used", "8")
VP9 = ("-c:v", "libvpx-vp9", "-lossless", "1", "-deadline", "realtime", "-cpu-used", "8")
X265 = ("-c:v", "libx265", "-preset", "ultrafast", "-x265-params", "lossless=1:log-level=error")


CORNERS = ("0xB46E46", "0x3C78C8", "0x28A050", "0xC8C8C8")
PICTURE = "fade=in:0:4:color=0x404040," + ",".join(
    f"drawbox=x=iw*{i % 2}/2:y=ih*{i // 2}/2:w=iw/2:h=ih/2:color={color}:t=fill"
    for i, color in enumerate(CORNERS)
)


def part(
    path: Path,
    size: str,
    pix_fmt: str,
    *codec: str,
    colors: str = "bt709",
    full: bool = False,
    trc: str = "bt709",
) -> Path:
    """Four colors that come out of gray, in their own size, pixel format, matrix and range."""
    where = "pc" if full else "tv"
    return ffmpeg(
        "-f", "lavfi", "-i", f"color=size={size}:rate=25,format=gbrp,{PICTURE}", "-frames:v", COUNT, "-vf",
        f"scale=out_color_matrix={colors}:out_range={where},format={pix_fmt},setparams=color_trc={trc}",
        "-colorspace", colors, "-color_range", where, "-color_trc", trc, *codec, path,
    )  # fmt: skip


def joined(out: Path, *parts: Path) -> Path:
    """The parts' packets one after the other, as ``ffmpeg -f concat -c copy`` and ``cat`` have them."""
    if out.suffix == ".ts":
        out.write_bytes(b"".join(one.read_bytes() for one in parts))
        return out
    names = out.with_suffix(".txt")
    names.write_text("".join(f"file '{one}'\n" for one in parts))
    return ffmpeg("-f", "concat", "-safe", "0", "-i", names, "-c", "copy", out)


def corners(image: np.ndarray) -> np.ndarray:
    """The four colors, each at its center."""
    height, width, _ = image.shape
    return image[height // 4 :: height // 2, width // 4 :: width // 2].astype(int)


def shown(path: Path, size: str, colors: str, full: bool) -> list[np.ndarray]:
    """What FFmpeg's own command decodes and scales."""
    where = "pc" if full else "tv"
    raw = path.with_suffix(".rgb")
    flags = "bicubic+full_chroma_int+full_chroma_inp+accurate_rnd"
    ffmpeg(
        "-i", path, "-vf", f"scale={size.replace('x', ':')}:in_color_matrix={colors}:in_range={where}:"
        f"flags={flags},format=rgb24", "-f", "rawvideo", raw,
    )  # fmt: skip
    width, height = map(int, size.split("x"))
    return list(np.frombuffer(raw.read_bytes(), np.uint8).reshape(-1, height, width, 3))


SMALL, LARGE = ("96x64", "yuv420p", "bt709", False), ("128x96", "yuv420p", "bt709", False)
VP8_SMALL, VP8_LARGE = ("64x48", "yuv420p", "bt470bg", False), ("96x64", "yuv420p", "bt470bg", False)
CHANGES = {
    "larger": (".ts", SMALL, LARGE, X264),
    "smaller": (".ts", LARGE, SMALL, X264),
    "hevc": (".ts", SMALL, LARGE, X265),
    "shape": (".ts", ("128x64", *SMALL[1:]), ("64x128", *SMALL[1:]), X264),
    "all": (".ts", ("96x64", "yuv420p", "smpte170m", False), ("128x96", "yuv444p", "bt709", True), X264),
    "range": (".mkv", ("96x64", "yuv444p", "bt709", False), ("96x64", "yuv444p", "bt709", True), X264),
    "adaptive webm": (".webm", VP8_LARGE, VP8_SMALL, VP8),
    "adaptive mkv": (".mkv", SMALL, LARGE, VP9),
}


@pytest.fixture(params=CHANGES)
def clip(request, tmp_path):
    """The clip, what FFmpeg shows of it in the size of the first part, and what changes."""
    suffix, one, two, codec = CHANGES[request.param]
    parts = []
    for number, (size, pix_fmt, colors, full) in enumerate((one, two)):
        path = tmp_path / f"{number}{suffix}"
        parts.append(part(path, size, pix_fmt, *codec, colors=colors, full=full))
    expected = [
        frame
        for path, (_, _, colors, full) in zip(parts, (one, two), strict=True)
        for frame in shown(path, one[0], colors, full)
    ]
    changes = [a != b for a, b in zip(one, two, strict=True)]
    return joined(tmp_path / f"in{suffix}", *parts), expected, changes


def test_a_clip_that_changes_goes_on_like_its_first_frame(clip, tmp_path, triton, caplog):
    source, expected, (size, pix_fmt, *colors) = clip
    out = tmp_path / "out.mkv"
    result = run_client(source, out, "--url", triton.url, *LOSSLESS)
    assert result.exit_code == 0, result.output

    frames = decoded(out)
    assert len(frames) == len(expected) == 2 * COUNT
    for found, frame in zip(frames, expected, strict=True):
        assert found.shape == (4 * frame.shape[0], 4 * frame.shape[1], 3)
        assert np.abs(corners(found) - corners(frame)).max() <= 2
    steps = {round(float(after - before), 3) for before, after in pairwise(frame_times(out))}
    assert steps == {0.04}
    (line,) = [line for line in caplog.messages if "changes at" in line]
    assert "changes at 0.24 s (" in line
    assert [word in line for word in ("size ", "pixel format ", "colors ")] == [size, pix_fmt, any(colors)]


@pytest.mark.parametrize("clip", ["larger", "all", "adaptive mkv"], indirect=True)
def test_a_run_over_a_change_is_resumed(tmp_path, clip):
    """Stopped before its first segment, and after each of those around the change."""
    source, _, _ = clip
    with FakeTriton() as triton:
        calm, out = tmp_path / "calm.mkv", tmp_path / "out.mkv"
        how = ("--url", triton.url, "--segment-frames", 4, *LOSSLESS)
        assert run_client(source, calm, *how).exit_code == 0
        for stop in (2, 5, 5):
            start = triton.requests

            def refuse(count, last=start + stop):
                return (grpc.StatusCode.INVALID_ARGUMENT, "told to") if count > last else None

            triton.failure = refuse
            assert run_client(source, out, *how).exit_code == 1
        triton.failure = lambda count: None
        assert run_client(source, out, *how).exit_code == 0
    assert frame_times(out) == frame_times(calm)
    for found, expected in zip(decoded(out), decoded(calm), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_colors_that_change_are_right_when_deinterlaced(tmp_path, triton):
    """The filter is told of each frame's own colors."""
    one = part(tmp_path / "1.ts", "96x64", "yuv444p", *X264)
    two = part(tmp_path / "2.ts", "96x64", "yuv444p", *X264, colors="smpte170m", full=True)
    source, out = joined(tmp_path / "in.ts", one, two), tmp_path / "out.mkv"
    result = run_client(source, out, "--url", triton.url, "--deinterlace", "on", *LOSSLESS)
    assert result.exit_code == 0, result.output
    frames = decoded(out)
    assert len(frames) == 2 * COUNT
    assert np.abs(corners(frames[COUNT - 1]) - corners(frames[-1])).max() <= 2


def test_a_change_to_hdr_is_refused_where_it_is(tmp_path, triton):
    one = part(tmp_path / "1.ts", "96x64", "yuv420p", *X264)
    two = part(tmp_path / "2.ts", "96x64", "yuv420p", *X264, trc="smpte2084")
    result = run_client(joined(tmp_path / "in.ts", one, two), tmp_path / "out.mkv", "--url", triton.url)
    assert result.exit_code == 1
    assert "expected one dynamic range, found that it changes at 0.24 s in" in result.output


def test_comparison_and_report_of_a_clip_that_changes(tmp_path, triton):
    one = part(tmp_path / "1.ts", "96x64", "yuv420p", *X264)
    two = part(tmp_path / "2.ts", "128x96", "yuv420p", *X264)
    source = joined(tmp_path / "in.ts", one, two)
    extras = ("--compare", tmp_path / "c.mkv", "--report", tmp_path / "r.html")
    result = run_client(source, tmp_path / "out.mkv", "--url", triton.url, *extras)
    assert result.exit_code == 0, result.output
    with av.open(tmp_path / "c.mkv") as container:
        assert sum(1 for _ in container.decode(video=0)) == 2 * COUNT
    assert Fraction(1, 25) in {b - a for a, b in pairwise(frame_times(tmp_path / "c.mkv"))}
