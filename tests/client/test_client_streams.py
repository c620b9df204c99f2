"""Which streams come along, and how: options, conversions, interlacing, the shape of pixels."""

from __future__ import annotations

import errno
from fractions import Fraction

import av
import numpy as np
import pytest
from client_fakes import FakeTriton, decoded, frame_times, packets, pictures, run_client, write_clip
from ffmpeg import FILM, H264, TONE, ffmpeg

from mst_gan_client.options import streams

pytestmark = pytest.mark.slow

SUBTITLES = (
    "1\n00:00:00,080 --> 00:00:00,240\nHello <i>there</i>\n\n2\n00:00:00,320 --> 00:00:00,480\nworld\n"
)
SHOWN = [(Fraction(8, 100), Fraction(16, 100)), (Fraction(32, 100), Fraction(16, 100))]


@pytest.fixture(scope="module")
def triton():
    with FakeTriton() as server:
        yield server


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """Picture, two tones, subtitles: streams 0 to 3."""
    folder = tmp_path_factory.mktemp("film")
    (folder / "text.srt").write_text(SUBTITLES)
    maps = ("-map", "0", "-map", "1", "-map", "1", "-map", "2", "-metadata:s:3", "language=deu")
    return ffmpeg(*FILM, *TONE, "-i", folder / "text.srt", *maps, *H264, "-c:a", "aac", "-c:s", "srt",
                  folder / "film.mkv")  # fmt: skip


def upscaled(source, out, triton, *options):
    result = run_client(source, out, "--url", triton.url, *options)
    assert result.exit_code == 0, result.output
    return out


def kinds(path):
    with av.open(path) as container:
        return [stream.codec_context.name for stream in container.streams if stream.codec_context]


def texts(path):
    """(start, duration, text) of every subtitle, as its decoder tells it."""
    with av.open(path) as container:
        found = []
        for packet in container.demux(subtitles=0):
            shown = packet.stream.codec_context.decode2(packet) if packet.size else None
            if shown:
                tick = packet.time_base
                text = shown.rects[0].dialogue.decode()
                found.append((packet.pts * tick, packet.duration * tick, text))
        return found


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), ["h264", "aac", "aac", "srt"]),
        (("--audio", "none"), ["h264", "srt"]),
        (("--no-subtitles",), ["h264", "aac", "aac"]),
        (("--streams", "-1"), ["h264", "aac", "srt"]),
        (("--streams", "-1,-3"), ["h264", "aac"]),
        (("--streams", "0,3"), ["h264", "srt"]),
        (("--audio", "flac", "--no-subtitles"), ["h264", "flac", "flac"]),
    ],
)
def test_streams_that_are_wanted(tmp_path, triton, film, options, expected):
    out = upscaled(film, tmp_path / "out.mkv", triton, *options)
    assert [name.replace("subrip", "srt") for name in kinds(out)] == expected
    assert frame_times(out) == frame_times(film)


def test_numbers_of_streams():
    assert streams("0,3") == (frozenset((0, 3)), frozenset())
    assert streams("-2,-3") == (None, frozenset((2, 3)))


@pytest.mark.parametrize("value", ["1,-2", "a", "", "1;2"])
def test_wrong_numbers_of_streams(tmp_path, film, value):
    result = run_client(film, tmp_path / "out.mkv", "--streams", value)
    assert result.exit_code == 2
    assert "expected numbers to keep, as 0,1, or to leave out, as -2" in result.output


def test_a_stream_that_is_not_there(tmp_path, triton, film):
    result = run_client(film, tmp_path / "out.mkv", "--url", triton.url, "--streams", "0,9")
    assert result.exit_code == 1
    assert f"expected numbers of streams of {film} in --streams, 0 to 3, found 9" in result.output


def samples(path):
    """All samples of the first audio stream, -1..1, and the time of the first."""
    with av.open(path) as container:
        frames = list(container.decode(audio=0))
        largest = {"s16": 1 << 15, "s16p": 1 << 15, "s32": 1 << 31, "s32p": 1 << 31}
        parts = [frame.to_ndarray() / largest.get(frame.format.name, 1) for frame in frames]
        parts = [
            part.reshape(-1, frames[0].layout.nb_channels).T if part.shape[0] == 1 else part for part in parts
        ]
        return np.concatenate(parts, axis=1)[0], frames[0].time


@pytest.mark.parametrize("codec", ["aac", "flac"])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("source_codec", ["pcm_s16le", "adpcm_ms", "wmav2", "libmp3lame"])
def test_encoded_audio_is_the_same_tone_at_the_same_time(tmp_path, triton, codec, suffix, source_codec):
    burst = ("-af", "volume='if(between(t,0.3,0.4),1,0)':eval=frame")
    source = ffmpeg(*FILM, *TONE, *burst, *H264, "-c:a", source_codec, tmp_path / "in.avi")
    out = upscaled(source, tmp_path / f"out{suffix}", triton, "--audio", codec)
    assert kinds(out) == ["h264", codec]
    for path in (source, out):
        heard, start_s = samples(path)
        loud = np.flatnonzero(np.abs(heard) > 0.02) / 44100 + start_s
        assert abs(loud[0] - 0.3) < 0.07 and abs(loud[-1] - 0.4) < 0.07  # a codec smears it
    before, after = samples(source), samples(out)
    begin = [(np.flatnonzero(np.abs(heard) > 0.02) / 44100 + start)[0] for heard, start in (before, after)]
    assert abs(begin[1] - begin[0]) < 0.01


def test_flac_is_lossless(tmp_path, triton):
    source = ffmpeg(*FILM, *TONE, *H264, "-c:a", "pcm_s16le", tmp_path / "in.avi")
    out = upscaled(source, tmp_path / "out.mkv", triton, "--audio", "flac")
    (before, _), (after, _) = samples(source), samples(out)
    assert (after[: len(before)] == before).all()
    assert not after[len(before) :].any()


@pytest.mark.parametrize("form", ["mov_text", "srt", "ass", "webvtt"])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
def test_text_subtitles_go_anywhere(tmp_path, triton, film, form, suffix):
    holder = ".mp4" if form == "mov_text" else ".mkv"
    source = ffmpeg("-i", film, "-map", "0", "-c", "copy", "-c:s", form, tmp_path / f"in{holder}")
    out = upscaled(source, tmp_path / f"out{suffix}", triton)
    if suffix == ".mkv":
        expected = {"mov_text": "subrip", "srt": "subrip", "ass": "ssa"}.get(form, form)
        assert kinds(out)[-1].replace("srt", "subrip") == expected
    else:
        assert kinds(out)[-1] == "mov_text"
    found = texts(out)
    assert (
        [(start, length) for start, length, _ in found]
        == [(start, length) for start, length, _ in texts(source)]
        == SHOWN
    )
    assert ["Hello" in found[0][2], "there" in found[0][2], "world" in found[1][2]] == [True] * 3
    with av.open(out) as container:  # QuickTime's table of languages has no "deu"
        assert suffix == ".mov" or container.streams.subtitles[0].language == "deu"


def test_a_subtitle_on_screen_when_the_part_begins(tmp_path, triton, film):
    out = upscaled(film, tmp_path / "out.mkv", triton, "--start", "0.2", "--duration", "0.2")
    found = texts(out)
    assert [(start, length) for start, length, _ in found] == [
        (0, Fraction(4, 100)), (Fraction(12, 100), Fraction(16, 100))
    ]  # fmt: skip


def combed(path, count=6):
    """Interlaced H.264: a bar that moves on between the fields."""
    images = []
    for t in range(count):
        image = np.full((48, 64, 3), 40, np.uint8)
        for field in range(2):
            at = 4 + 4 * (2 * t + field)
            image[field::2, at : at + 12] = 220
        images.append(image)
    options = {"x264-params": "tff=1", "qp": "0"}
    return write_clip(path, images, pix_fmt="yuv420p", options=options)


def combs(path):
    """How much neighboring rows of the frames differ beyond those two apart."""
    frames = [frame[..., 1].astype(int) for frame in decoded(path)]
    return np.mean([np.abs(np.diff(f, axis=0)).mean() for f in frames])


@pytest.mark.parametrize("which", ["off", "auto", "on"])
def test_deinterlacing_keeps_frames_and_times(tmp_path, triton, caplog, which):
    clip = combed(tmp_path / "in.mp4")
    out = upscaled(clip, tmp_path / "out.mp4", triton, "--deinterlace", which)
    assert frame_times(out) == frame_times(clip)
    assert ("interlaced frames are upscaled as they are" in caplog.text) == (which == "off")
    small = ffmpeg("-i", out, "-vf", "scale=iw/4:ih/4:flags=neighbor", "-qp", "0", tmp_path / "small.mp4")
    assert (combs(small) < combs(clip) / 2) == (which != "off")


def test_progressive_frames_are_left_alone_by_auto(tmp_path, triton):
    clip = write_clip(tmp_path / "in.mkv", pictures(5), codec="ffv1", pix_fmt="yuv444p")
    lossless = ("--codec", "ffv1", "--pix-fmt", "yuv444p")
    plain = upscaled(clip, tmp_path / "plain.mkv", triton, *lossless)
    auto = upscaled(clip, tmp_path / "auto.mkv", triton, "--deinterlace", "auto", *lossless)
    for one, other in zip(decoded(plain), decoded(auto), strict=True):
        assert (one == other).all()


@pytest.mark.parametrize(
    ("aspect", "size"), [("16/11", (128, 280)), ("8/9", (144, 192)), ("1/1", (128, 192))]
)
def test_square_pixels(tmp_path, triton, aspect, size):
    clip = ffmpeg("-f", "lavfi", "-i", "testsrc2=size=48x32:rate=25:duration=0.12", "-vf", f"setsar={aspect}",
                  *H264, tmp_path / "in.mp4")  # fmt: skip
    out = upscaled(clip, tmp_path / "out.mp4", triton, "--square-pixels")
    with av.open(out) as container:
        stream = container.streams.video[0]
        assert (stream.height, stream.width) == size
        assert (stream.sample_aspect_ratio or 1) == 1


def test_square_pixels_and_a_final_size(tmp_path, triton, film):
    options = ("--square-pixels", "--final-size", "96x64")
    result = run_client(film, tmp_path / "out.mp4", "--url", triton.url, *options)
    assert result.exit_code == 1
    assert "expected --square-pixels or --final-size, found both" in result.output


@pytest.mark.parametrize(
    ("codec", "suffix"),
    [("h264", "mp4"), ("hevc", "mkv"), ("av1", "mp4"), ("av1", "mkv"), ("ffv1", "mkv"), ("prores", "mov"),
     ("prores", "mkv"), ("av1", "webm")],
)  # fmt: skip
def test_the_shape_of_pixels_is_kept_by_every_codec(tmp_path, triton, codec, suffix):
    clip = ffmpeg("-f", "lavfi", "-i", "testsrc2=size=72x56:rate=25:duration=0.12", "-vf", "setsar=67/46",
                  *H264, tmp_path / "in.mp4")  # fmt: skip
    out = upscaled(clip, tmp_path / f"out.{suffix}", triton, "--codec", codec)
    with av.open(out) as container:
        assert container.streams.video[0].sample_aspect_ratio == Fraction(67, 46)
    assert packets(out, "video")


def test_the_shape_of_pixels_in_y4m(tmp_path, triton):
    import subprocess
    import sys
    from pathlib import Path

    clip = ffmpeg("-f", "lavfi", "-i", "testsrc2=size=72x56:rate=25:duration=0.12", "-vf", "setsar=67/46",
                  *H264, tmp_path / "in.mp4")  # fmt: skip
    script = Path(__file__).parents[2] / "client" / "upscale.py"
    command = [sys.executable, str(script), str(clip), "-", "--url", triton.url]
    done = subprocess.run(command, capture_output=True, timeout=120, check=True)
    assert b" A67:46 " in done.stdout.split(b"\n", 1)[0]
    (tmp_path / "out.y4m").write_bytes(done.stdout)
    assert len(decoded(tmp_path / "out.y4m")) == 3


def test_encoded_audio_that_ends_early_is_noticed(tmp_path, triton, film, monkeypatch):
    from mst_gan_client.video import tracks

    whole = tracks.ConvertedAudio.packets
    monkeypatch.setattr(
        tracks.ConvertedAudio,
        "packets",
        lambda self, packet: whole(self, packet) if packet.pts * packet.time_base < 0.1 else iter(()),
    )
    result = run_client(film, tmp_path / "out.mkv", "--url", triton.url, "--audio", "aac")
    assert result.exit_code == 1
    assert "is not right: expected audio from" in result.output
    assert not (tmp_path / "out.mkv").exists()


def test_a_run_that_goes_on_is_rehearsed_too(tmp_path, triton, film, monkeypatch):
    """Other streams may be wanted than before: what does not fit is known before the rest of the work."""
    from mst_gan_client.video.mux import Muxer

    out = tmp_path / "out.mp4"
    arguments = (film, out, "--url", triton.url, "--segment-frames", 3)
    with monkeypatch.context() as patch:
        patch.setattr(Muxer, "write", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "unplugged")))
        assert run_client(*arguments).exit_code == 1
    assert len(list(out.with_name("out.mp4.part").glob("*.segment"))) == 5
    before = triton.requests
    assert run_client(*arguments, "--audio", "flac", "--no-subtitles").exit_code == 0
    assert triton.requests - before < 15
    assert kinds(out) == ["h264", "flac", "flac"]
