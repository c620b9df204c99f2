"""Pixel formats x containers, at odd sizes, rates, rotations and with other streams, against FFmpeg itself.

The server of these tests repeats each pixel four times each way, so that the output is known: what FFmpeg's
binary decodes and converts to RGB, each pixel 4x4, at the same times, with the same other streams.
"""

from __future__ import annotations

import random
import subprocess
from fractions import Fraction

import av
import imageio_ffmpeg
import numpy as np
import pytest
from client_fakes import FakeTriton, run_client
from ffmpeg import ffmpeg

pytestmark = pytest.mark.slow

TITLE = "Format matrix (pixel format x container; sizes, rates, rotations, streams drawn)"
LEVELS = 2  # by which a color may differ from FFmpeg's
X264 = ("-c:v", "libx264", "-preset", "ultrafast", "-bf", "2")
X265 = ("-c:v", "libx265", "-preset", "ultrafast", "-x265-params", "log-level=none")
DEEP = ("yuv420p10le", "yuv422p10le", "yuv444p10le")
PLAIN = ("yuv420p", "yuv422p", "yuv444p")

CONTAINERS: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    # suffix and codec: encoder, pixel formats, codecs of sound
    "mp4 h264": (X264, (*PLAIN, "yuvj420p", "yuv420p10le", "nv12"), ("aac", "libmp3lame")),
    "mp4 hevc": (X265, (*PLAIN, *DEEP, "gray"), ("aac", "flac")),
    "mov prores": (("-c:v", "prores_ks"), ("yuv422p10le", "yuv444p10le"), ("pcm_s16le", "aac")),
    "mov png": (("-c:v", "png"), ("rgb24", "rgba", "gray", "rgb48be", "monob"), ("pcm_s24le",)),
    "mkv h264": (X264, (*PLAIN, "yuvj444p", "yuv444p10le"), ("libvorbis", "ac3")),
    "mkv ffv1": (
        ("-c:v", "ffv1", "-level", "3"),
        ("yuv410p", "yuv411p", "yuv440p", "yuv444p16le", "yuva444p", "gbrp", "gbrp10le", "gray10le", "bgr0"),
        ("flac", "pcm_s16le"),
    ),
    "webm vp9": (
        ("-c:v", "libvpx-vp9", "-cpu-used", "8", "-lossless", "1"),
        ("yuv420p", "yuv440p", "gbrp"),
        ("libopus", "libvorbis"),
    ),
    "avi mpeg4": (("-c:v", "mpeg4", "-bf", "1"), ("yuv420p",), ("libmp3lame", "pcm_s16le")),
    "avi mjpeg": (("-c:v", "mjpeg"), ("yuvj420p", "yuvj422p", "yuvj444p"), ("pcm_u8", "adpcm_ms")),
    "avi raw": (("-c:v", "rawvideo"), ("uyvy422", "yuyv422", "yuv420p"), ("pcm_s16le",)),
    "ts h264": (X264, ("yuv420p", "yuv422p"), ("aac", "mp2", "ac3")),
    "ts mpeg2": (("-c:v", "mpeg2video", "-bf", "2"), ("yuv420p", "yuv422p"), ("mp2",)),
    "mpg mpeg2": (("-c:v", "mpeg2video", "-bf", "2"), ("yuv420p",), ("mp2", "ac3")),
    "flv h264": (X264, ("yuv420p", "yuv444p"), ("aac",)),
    "wmv wmv2": (("-c:v", "wmv2"), ("yuv420p",), ("wmav2",)),
    "ogv theora": (("-c:v", "libtheora"), ("yuv420p", "yuv444p"), ("libvorbis",)),
    "nut raw": (("-c:v", "rawvideo"), ("rgb24", "nv21", "yuv420p", "rgb565le", "gray16le"), ("pcm_s16le",)),
    "y4m raw": (("-strict", "-1"), ("yuv420p", "yuv411p", "yuv444p", "gray", "yuv420p10le"), ()),
    "gif gif": ((), ("bgr8",), ()),
}  # fmt: skip
SHARED = {
    "yuv410p": (4, 4),
    "yuv411p": (4, 1),
    "yuv440p": (1, 2),
    **dict.fromkeys(("yuv422p", "yuvj422p", "yuv422p10le", "uyvy422", "yuyv422"), (2, 1)),
    **dict.fromkeys(("yuv420p", "yuvj420p", "yuv420p10le", "nv12", "nv21"), (2, 2)),
}
"""Pixels (across, down) that share a sample of chroma: encoders want whole ones."""
CHROMA_LEFT = frozenset(("h264", "hevc", "mpeg2video", "mpeg4"))  # which FFmpeg's command does not ask
NOT_IN_MP4 = frozenset(("wmav2", "adpcm_ms", "pcm_u8"))
VARIANTS = 2
RATES = ("24000/1001", "24", "25", "30000/1001", "50", "12")
CELLS = [
    (container, pix_fmt, variant)
    for container, (_, formats, _) in CONTAINERS.items()
    for pix_fmt in formats
    for variant in range(VARIANTS)
]


@pytest.fixture(scope="module")
def triton():
    with FakeTriton() as server:
        yield server


def drawn_source(folder, container, pix_fmt, rng):
    """A clip of some frames; even sides where chroma is shared, for encoders refuse others."""
    suffix, _ = container.split()
    encoder, _, sounds = CONTAINERS[container]
    step_w, step_h = SHARED.get(pix_fmt, (1, 1))
    smallest = 64 if "hevc" in container else 24  # libx265 crashes at small sizes
    width, height = (step * rng.randrange(smallest // step, 96 // step) for step in (step_w, step_h))
    if suffix in ("flv", "wmv", "mpg", "ogv") or "mpeg2" in container:
        width, height = width // 2 * 2, height // 2 * 2
    rate = rng.choice(RATES if "mpeg2" not in container else RATES[:5])
    sound = rng.choice((None, *sounds)) if sounds else None
    inputs = ["-f", "lavfi", "-i", f"testsrc2=size={width}x{height}:rate={rate}:duration=1"]
    if sound:
        inputs += ["-f", "lavfi", "-i", "sine=sample_rate=48000:duration=0.3"]
    arguments = ["-frames:v", str(rng.randrange(2, 9)), "-pix_fmt", pix_fmt, *encoder]
    if sound:
        arguments += ["-c:a", sound, "-strict", "-2"]
    path = ffmpeg(*inputs, *arguments, folder / f"in.{suffix}")
    if suffix in ("mp4", "mov") and rng.random() < 0.4:
        turn = ("-display_rotation", rng.choice(("90", "180", "270")))
        path = ffmpeg(*turn, "-i", path, "-map", "0", "-c", "copy", folder / f"turned.{suffix}")
    return path


def as_ffmpeg_sees(path, folder):
    """RGB frames and their times, by FFmpeg's binary."""
    times = folder / "times"
    flags = "bicubic+full_chroma_int+full_chroma_inp+accurate_rnd+bitexact"
    video = ("-map", "0:v:0", "-fps_mode", "passthrough")
    with av.open(path) as container:
        stream = next(s for s in container.streams.video)
        codec, pix_fmt = stream.codec_context.name, stream.codec_context.pix_fmt
        is_left = codec in CHROMA_LEFT and not (codec == "hevc" and "420" not in pix_fmt)
    where = "left" if is_left else "auto"
    scaler = ("-vf", f"scale=in_chroma_loc={where}:flags={flags}")
    rgb = (*video, *scaler, "-pix_fmt", "rgb24", "-f", "rawvideo", "-")
    clock = (*video, "-enc_time_base", "demux", "-f", "framecrc", times)
    reading = ("-v", "error", "-y", "-noautorotate", "-copyts", "-i", path)
    command = [imageio_ffmpeg.get_ffmpeg_exe(), *map(str, (*reading, *rgb, *clock))]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = times.read_text().splitlines()
    tick = next(Fraction(line.split()[-1]) for line in lines if line.startswith("#tb"))
    shown = [int(line.split(",")[2]) * tick for line in lines if not line.startswith("#")]
    with av.open(path) as container:
        stream = next(s for s in container.streams.video)
        shape = (len(shown), stream.height, stream.width, 3)
    return np.frombuffer(done.stdout, np.uint8).reshape(shape), shown


def sound_of(path):
    """How much sound FFmpeg copies: packets, and bytes of PCM."""
    copying = ("-v", "error", "-i", str(path), "-map", "0:a?", "-c", "copy", "-f", "framecrc", "-")
    command = [imageio_ffmpeg.get_ffmpeg_exe(), *copying]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    sizes = [int(line.split(",")[4]) for line in done.stdout.splitlines() if not line.startswith("#")]
    with av.open(path) as container:
        names = [stream.codec_context.name for stream in container.streams.audio]
    names = [{"mp2": "mp3float"}.get(name, name) for name in names]  # MP4 has one name for both
    return names, sum(sizes) if names and names[0].startswith("pcm") else len(sizes)


def turn_of(path):
    with av.open(path) as container:
        return next(container.decode(video=0)).rotation


@pytest.mark.parametrize(("container", "pix_fmt", "variant"), CELLS)
def test_a_format(tmp_path, triton, matrix_cell, container, pix_fmt, variant):
    record = matrix_cell(TITLE, pix_fmt, container)
    rng = random.Random(f"{container} {pix_fmt} {variant}")
    source = drawn_source(tmp_path, container, pix_fmt, rng)
    names, _ = sound_of(source)
    if variant % 2 and not NOT_IN_MP4.intersection(names):
        out, how = tmp_path / "out.mp4", ("--crf", "0", "--pix-fmt", "yuv444p")
        levels = LEVELS + 2  # YUV of 8 bits and back
    else:
        out, how, levels = tmp_path / "out.mkv", ("--codec", "ffv1", "--pix-fmt", "bgr0"), LEVELS
    result = run_client(source, out, "--url", triton.url, *how, "--segment-frames", 3)
    assert result.exit_code == 0, result.output
    seen, times = as_ffmpeg_sees(source, tmp_path)
    found, new_times = as_ffmpeg_sees(out, tmp_path)
    assert found.shape == (len(seen), 4 * seen.shape[1], 4 * seen.shape[2], 3)
    worst = max(np.abs(found[:, y::4, x::4].astype(int) - seen).max() for y, x in ((0, 0), (2, 1), (3, 3)))
    assert worst <= levels, f"colors differ by {worst} levels"
    assert [t - times[0] for t in times] == pytest.approx([t - new_times[0] for t in new_times], abs=0.0011)
    assert sound_of(out) == sound_of(source)
    assert turn_of(out) == turn_of(source)
    record("ok")
