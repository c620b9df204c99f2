"""Files as cameras, recorders and converters make them: nothing lost in silence, nothing found out late."""

from __future__ import annotations

import errno
import re
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Discard, Disposition
from client_fakes import FakeTriton, decoded, frame_times, packets, pictures, run_client, write_clip
from ffmpeg import FILM, H264, TONE, ffmpeg, insert_box

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def triton():
    with FakeTriton() as server:
        yield server


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """A fifteenth of a second is a frame time; H.264 with B-frames and a tone."""
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    return ffmpeg(*FILM, *TONE, *H264, "-c:a", "aac", path)


def upscaled(source, out, triton, *options):
    result = run_client(source, out, "--url", triton.url, *options)
    assert result.exit_code == 0, result.output
    return out


def refused(source, out, triton, *options):
    """The one line of a run that is refused before its first frame."""
    before = triton.requests
    result = run_client(source, out, "--url", triton.url, *options)
    assert result.exit_code == 1, result.output
    assert triton.requests == before
    assert not out.exists() and not Path(f"{out}.part").exists()
    line = result.output.splitlines()[-1]
    assert line.startswith("Error: ")
    return line


def steps(path):
    """The distances of frames."""
    return {after - before for before, after in pairwise(frame_times(path))}


def codecs(path):
    with av.open(path) as container:
        return [stream.codec_context.name for stream in container.streams if stream.codec_context]


def sound_times(path):
    with av.open(path) as container:
        return [packet.pts * packet.time_base for packet in container.demux(audio=0) if packet.size]


def data_packets(path):
    with av.open(path) as container:
        container.streams.data[0].discard = Discard.default  # or FFmpeg skips what is as short as this
        return [bytes(packet) for packet in container.demux(data=0) if packet.size]


def joined(folder, suffix, *clips):
    """Files put one after the other, as recorders and `cat` do."""
    path = folder / f"joined{suffix}"
    path.write_bytes(b"".join(clip.read_bytes() for clip in clips))
    return path


# Times


@pytest.mark.parametrize("sound", [False, True], ids=["silent", "sound"])
@pytest.mark.parametrize("suffix", [".ts", ".mpg", ".m2ts"])
@pytest.mark.parametrize("out", ["out.mkv", "out.mp4"])
def test_joined_recordings_count_on(tmp_path, triton, suffix, sound, out):
    """The second begins with the times of the first again."""
    codec = ("-c:v", "mpeg2video", "-bf", "2") if suffix == ".mpg" else H264
    audio = (*TONE, "-c:a", "mp2") if sound else ()
    one = ffmpeg(*FILM, *audio, *codec, tmp_path / f"one{suffix}")
    out = upscaled(joined(tmp_path, suffix, one, one), tmp_path / out, triton)
    assert len(frame_times(out)) == 30
    assert all(abs(step - Fraction(1, 25)) <= Fraction(1, 1000) for step in steps(out))
    if sound:
        assert len(packets(out, "audio")) >= 2 * len(packets(one, "audio")) - 2
        assert abs(sound_times(out)[-1] - frame_times(out)[-1]) < Fraction(1, 10)


def test_frames_before_zero(tmp_path, triton, film):
    """A Matroska file may begin before zero, where its times are not written."""
    source = ffmpeg("-i", film, "-c", "copy", "-output_ts_offset", "-0.22", "-avoid_negative_ts", "disabled",
                    tmp_path / "in.mkv")  # fmt: skip
    for name in ("out.mp4", "out.mkv"):
        out = upscaled(source, tmp_path / name, triton)
        assert len(frame_times(out)) == len(decoded(source))
        assert all(abs(step - Fraction(1, 25)) <= Fraction(1, 1000) for step in steps(out))
        assert frame_times(out)[0] == 0


@pytest.mark.parametrize("suffix", [".mkv", ".mp4"])
def test_sound_whose_times_step_back(tmp_path, triton, film, suffix):
    """Every packet is there, its time mended as FFmpeg mends it."""
    source = ffmpeg("-i", film, "-c", "copy", tmp_path / "in.mkv")
    data = bytearray(source.read_bytes())
    for packet in packets(source, "audio")[12:]:
        time = data.index(packet) - 3  # of the block, in milliseconds from the cluster's, before its flags
        data[time : time + 2] = (int.from_bytes(data[time : time + 2], "big") - 60).to_bytes(2, "big")
    source.write_bytes(data)
    assert min(after - before for before, after in pairwise(sound_times(source))) < 0
    out = upscaled(source, tmp_path / f"out{suffix}", triton)
    assert packets(out, "audio") == packets(source, "audio")


def test_a_picture_that_begins_late_is_not_cut_short(tmp_path, triton, film):
    """FFmpeg's DURATION tag says when a stream ends, not how long it is."""
    source = ffmpeg("-itsoffset", "0.5", "-i", film, "-i", film, "-map", "0:v", "-map", "1:a", "-c", "copy",
                    tmp_path / "in.mkv")  # fmt: skip
    assert frame_times(source)[0] >= Fraction(1, 2)
    assert frame_times(upscaled(source, tmp_path / "out.mkv", triton)) == frame_times(source)


def test_a_recording_that_begins_between_key_frames(tmp_path, triton, caplog):
    whole = ffmpeg("-f", "lavfi", "-i", "testsrc2=size=64x48:rate=25:duration=1.2", *H264, "-g", "10",
                   tmp_path / "whole.ts")  # fmt: skip
    source = tmp_path / "in.ts"
    with av.open(whole) as container:
        starts = [p.pos for p in container.demux(video=0) if p.size]
    data = whole.read_bytes()
    source.write_bytes(data[: 3 * 188] + data[starts[2] // 188 * 188 :])
    out = upscaled(source, tmp_path / "out.mkv", triton)
    assert frame_times(out) == frame_times(source)
    assert "begins in the middle of a group of pictures" in caplog.text


def test_audio_that_starts_after_the_part(tmp_path, triton, film, caplog):
    source = ffmpeg("-i", film, "-itsoffset", "0.4", "-i", film, "-map", "0:v", "-map", "1:a", "-c", "copy",
                    tmp_path / "in.mp4")  # fmt: skip
    out = upscaled(source, tmp_path / "out.mp4", triton, "--duration", "0.2")
    assert len(frame_times(out)) == 5
    assert codecs(out) == ["h264"]
    assert "left out stream 1 (audio aac)" in caplog.text


def test_an_animated_image_compared(tmp_path, triton):
    """Its last frame is shown long, so a rate says nothing of how many frames there are."""
    source = tmp_path / "in.gif"
    ffmpeg("-f", "lavfi", "-i", "testsrc2=size=64x48:rate=10:duration=0.8", "-final_delay", "300", source)
    upscaled(source, tmp_path / "out.mkv", triton, "--compare", tmp_path / "x.png")
    assert decoded(tmp_path / "x.png")[0].size


# Streams


def test_the_film_and_not_its_thumbnail(tmp_path, triton, film):
    source = ffmpeg("-f", "lavfi", "-i", "color=red:size=32x24:rate=25:duration=0.04", "-i", film,
                    "-map", "0:v", "-map", "1", "-c", "copy", "-c:v:0", "mjpeg", "-disposition:v:0", "0",
                    tmp_path / "in.mkv")  # fmt: skip
    out = upscaled(source, tmp_path / "out.mp4", triton)
    assert len(frame_times(out)) == 15
    assert decoded(out)[0].shape == (192, 256, 3)


@pytest.mark.parametrize("suffix", [".mov", ".mp4"])
def test_a_data_stream_is_copied(tmp_path, triton, film, suffix):
    """As action cameras write it."""
    (tmp_path / "data.bin").write_bytes(b"DEVC" * 16)
    source = ffmpeg("-i", film, "-f", "data", "-i", tmp_path / "data.bin", "-map", "0", "-map", "1",
                    "-c", "copy", "-tag:d", "gpmd", "-f", "mov", tmp_path / f"in{suffix}")  # fmt: skip
    out = upscaled(source, tmp_path / f"out{suffix}", triton)
    assert data_packets(out) == data_packets(source) == [b"DEVC" * 16]


def test_a_data_stream_that_does_not_fit_is_said(tmp_path, triton, film, caplog):
    (tmp_path / "data.bin").write_bytes(b"DEVC" * 16)
    source = ffmpeg("-i", film, "-f", "data", "-i", tmp_path / "data.bin", "-map", "0", "-map", "1",
                    "-c", "copy", "-tag:d", "gpmd", tmp_path / "in.mov")  # fmt: skip
    upscaled(source, tmp_path / "out.mkv", triton)
    assert "left out stream 2 (data" in caplog.text


def test_a_stream_without_a_decoder(tmp_path, triton, film, caplog):
    """Teletext, as in broadcasts: this FFmpeg has no decoder for it, and Matroska no place."""
    source = tmp_path / "in.ts"
    with av.open(film) as old, av.open(source, "w") as new:
        copies = {stream: new.add_stream_from_template(stream, opaque=True) for stream in old.streams}
        teletext = new.add_mux_stream("dvb_teletext")
        teletext.time_base = Fraction(1, 90000)
        page = av.Packet(b"\x10" + b"\x02\x2c" + bytes(44))
        page.stream, page.pts, page.dts, page.time_base = teletext, 0, 0, Fraction(1, 90000)
        new.mux(page)
        for packet in old.demux():
            if packet.size:
                packet.stream = copies[packet.stream]
                new.mux(packet)
    out = upscaled(source, tmp_path / "out.mkv", triton)
    assert codecs(out) == ["h264", "aac"]
    assert "left out stream 2 (" in caplog.text


@pytest.mark.parametrize("codec", ["wmav2", "adpcm_ms", "pcm_mulaw", "pcm_alaw", "adpcm_ima_wav"])
@pytest.mark.parametrize("suffix", [".avi", ".mkv"])
def test_old_audio_in_matroska(tmp_path, triton, codec, suffix):
    """Matroska holds it by an older convention, and `ffmpeg -c copy` carries it there."""
    source = ffmpeg(*FILM, *TONE, *H264, "-c:a", codec, tmp_path / f"in{suffix}")
    out = upscaled(source, tmp_path / "out.mkv", triton)
    assert codecs(out) == ["h264", codec]
    assert b"".join(packets(out, "audio")) == b"".join(packets(source, "audio"))


@pytest.mark.parametrize("layout", ["mono", "stereo", "5.1"])
@pytest.mark.parametrize("suffix", [".avi", ".mkv"])
def test_pcm_in_mp4(tmp_path, triton, suffix, layout):
    """AVI and Matroska count channels without saying where they are; MP4 wants to know."""
    audio = (*TONE, "-af", f"aformat=channel_layouts={layout}")
    source = ffmpeg(*FILM, *audio, "-c:v", "mjpeg", "-c:a", "pcm_s16le", tmp_path / f"in{suffix}")
    out = upscaled(source, tmp_path / "out.mp4", triton)
    assert b"".join(packets(out, "audio")) == b"".join(packets(source, "audio"))


@pytest.mark.parametrize("codec", ["wmav2", "adpcm_ms"])
def test_audio_that_does_not_fit_is_refused_with_what_works(tmp_path, triton, codec):
    source = ffmpeg(*FILM, *TONE, *H264, "-c:a", codec, tmp_path / "in.avi")
    line = refused(source, tmp_path / "out.mp4", triton)
    assert f".mp4 files cannot hold stream 1 (audio {codec}) of {source}" in line
    assert "name the output .mkv, or pass --audio aac" in line
    out = upscaled(source, tmp_path / "out.mp4", triton, "--audio", "aac")
    assert codecs(out) == ["h264", "aac"]


@pytest.mark.parametrize(
    "suffix", [".avi", ".ts", ".m2ts", ".flv", ".wmv", ".nut", ".mxf", ".mpg", ".gif", ""]
)
def test_containers_that_cannot_keep_the_promises(tmp_path, triton, film, suffix):
    line = refused(film, tmp_path / f"out{suffix}", triton)
    assert "expected a file name such as out.mp4 or out.mkv, found" in line


@pytest.mark.parametrize("kind", ["film", "apng"])
def test_a_film_is_no_image(tmp_path, triton, film, kind):
    source = film
    if kind == "apng":  # as browsers save it
        source = ffmpeg(*FILM, "-f", "apng", tmp_path / "in.png")
    line = refused(source, tmp_path / "out.png", triton)
    assert "expected one frame for out.png, found more" in line
    out = upscaled(source, tmp_path / "out.png", triton, "--max-frames", 1)
    assert len(decoded(out)) == 1


@pytest.mark.parametrize("image", ["jpeg", "png"])
def test_a_cover_of_matroska(tmp_path, triton, film, image):
    """It lies there as an attached file."""
    picture = ffmpeg("-f", "lavfi", "-i", "color=red:size=20x20", "-frames:v", "1", tmp_path / f"c.{image}")
    source = ffmpeg("-i", film, "-attach", picture, "-metadata:s:t", f"mimetype=image/{image}",
                    "-metadata:s:t", "filename=front.img", "-c", "copy", tmp_path / "in.mkv")  # fmt: skip
    for name in ("out.mkv", "out.mp4"):
        out = upscaled(source, tmp_path / name, triton)
        with av.open(out) as container:
            covers = [s for s in container.streams if s.disposition & Disposition.attached_pic]
            assert [(s.height, s.width) for s in covers] == [(20, 20)]
            assert name != "out.mkv" or covers[0].metadata["filename"] == "front.img"
            found = [bytes(p) for p in container.demux(covers) if p.size]
        assert found == [picture.read_bytes()]


# Pictures


def dolby_vision(folder, fallback):
    """HEVC of one gray level with a configuration record; profile 5 has no fallback."""
    path = folder / "in.mp4"
    quiet = {"x265-params": "log-level=error"}
    clip = write_clip(path, pictures(3, 64, 64), codec="libx265", pix_fmt="yuv420p10le", options=quiet)
    record = bytes([1, 0, 5 << 1, 1 << 3 | 5, fallback << 4]) + bytes(19)
    parents = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd", b"hev1")
    insert_box(clip, parents, (8 + len(record)).to_bytes(4, "big") + b"dvcC" + record)
    return path


def test_dolby_vision_without_fallback_is_refused_like_other_hdr(tmp_path, triton):
    source = dolby_vision(tmp_path, fallback=0)
    line = refused(source, tmp_path / "out.mp4", triton)
    assert "expected a clip of standard dynamic range, found Dolby Vision" in line
    upscaled(source, tmp_path / "out.mp4", triton, "--allow-hdr")


def test_dolby_vision_over_ordinary_colors_is_done(tmp_path, triton):
    upscaled(dolby_vision(tmp_path, fallback=2), tmp_path / "out.mp4", triton)


def test_colors_that_change_midway(tmp_path, triton, caplog):
    """Each frame is converted by its own tags: the same gray stays the same gray."""

    def half(name, tags, scale):
        return ffmpeg("-f", "lavfi", "-i", "color=0xB46E46:size=64x64:rate=25:duration=0.24", "-vf",
                      f"scale=out_color_matrix={scale},format=yuv444p", *tags, "-c:v", "libx264", "-qp", "0",
                      tmp_path / name)  # fmt: skip

    bt709 = ("-colorspace", "bt709", "-color_range", "tv", "-color_primaries", "bt709", "-color_trc", "bt709")
    bt601 = ("-colorspace", "smpte170m", "-color_range", "pc")
    one, two = half("1.ts", bt709, "bt709:out_range=tv"), half("2.ts", bt601, "bt601:out_range=pc")
    out = upscaled(joined(tmp_path, ".ts", one, two), tmp_path / "out.mkv", triton, "--pix-fmt", "yuv444p")
    frames = decoded(out)
    assert len(frames) == 12
    for frame in frames:
        assert np.abs(frame[128, 128].astype(int) - (0xB4, 0x6E, 0x46)).max() <= 3
    (line,) = [line for line in caplog.messages if "changes at" in line]
    assert "changes at 0.24 s (" in line
    assert "colors BT.601, full range instead of BT.709, limited range)" in line


@pytest.mark.parametrize("suffix", [".gif", ".webm"])
def test_transparency_is_said(tmp_path, triton, caplog, suffix):
    """VP9's decoder does not even show it."""
    codec = ("-c:v", "libvpx-vp9", "-pix_fmt", "yuva420p") if suffix == ".webm" else ()
    source = "color=red@0.5:size=64x48:rate=25:duration=0.2,format=rgba"
    clip = ffmpeg("-f", "lavfi", "-i", source, *codec, tmp_path / f"in{suffix}")
    upscaled(clip, tmp_path / "out.mkv", triton)
    assert "transparency is left out" in caplog.text


def test_whatever_pyav_raises_is_one_line(tmp_path, triton, film, monkeypatch):
    """Values that its enumerations do not know, attributes that a stream lacks, ..."""
    from mst_gan_client.video import convert

    for error in (
        ValueError("31 is not a valid Type"),
        AttributeError("no name"),
        OverflowError("too large"),
    ):
        monkeypatch.setattr(convert, "color_of", lambda frame, error=error: (_ for _ in ()).throw(error))
        line = refused(film, tmp_path / "out.mp4", triton)
        assert f"cannot read {film} ({type(error).__name__}: {error}): check that it plays" in line


@pytest.mark.parametrize("name", ["in.mp4", "in.mov", "in.avi"])
def test_a_file_that_is_cut_off_is_refused_first(tmp_path, triton, name):
    """As a download that broke off, where the header tells; not after hours."""
    codec = ("-c:v", "mpeg4") if name.endswith("avi") else (*H264, "-movflags", "+faststart")
    source = ffmpeg(*FILM, *TONE, *codec, "-c:a", "mp3" if name.endswith("avi") else "aac", tmp_path / name)
    upscaled(source, tmp_path / "whole.mkv", triton)
    data = source.read_bytes()
    source.write_bytes(data[: len(data) * 3 // 4])
    line = refused(source, tmp_path / "out.mkv", triton)
    what = (
        r"ends after \d+ of \d+ bytes"
        if name.endswith("avi")
        else r"ends before the last \d of its 15 frames"
    )
    assert re.search(rf"the file {source} {what}: get it whole, or pass --allow-damage", line)
    there = len(decoded(upscaled(source, tmp_path / "out.mkv", triton, "--allow-damage")))
    assert 4 < there < 15
    assert len(decoded(upscaled(source, tmp_path / "part.mkv", triton, "--max-frames", "4"))) == 4


def test_packets_that_a_decoder_does_not_know_are_counted(tmp_path, triton, caplog):
    """As of two codecs in a row: FFmpeg takes one for the whole file, and goes on after each error of it."""
    x265 = ("-c:v", "libx265", "-x265-params", "log-level=error")
    one, two = (ffmpeg(*FILM, *codec, tmp_path / f"{codec[1]}.ts") for codec in (H264, x265))
    out = upscaled(joined(tmp_path, ".ts", one, two), tmp_path / "out.mkv", triton)
    assert len(decoded(out)) == 15
    assert re.search(r"the \d+ before its first key frame \(\d\.\d\d s\) cannot be decoded", caplog.text)


@pytest.mark.parametrize("codec", ["wmav1", "wmav2"])
def test_sound_that_nobody_could_decode_is_refused_first(tmp_path, triton, codec):
    """MOV's muxer takes WMA, and what it writes plays nowhere."""
    source = ffmpeg(*FILM, *TONE, "-c:v", "wmv2", "-c:a", codec, tmp_path / "in.wmv")
    line = refused(source, tmp_path / "out.mov", triton)
    assert f".mov files cannot hold stream 1 (audio {codec})" in line
    assert "name the output .mkv, or pass --audio aac" in line
    out = upscaled(source, tmp_path / "out.mov", triton, "--audio", "aac")
    assert codecs(out) == ["h264", "aac"]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
def test_sound_that_starts_late_stays_in_step(tmp_path, triton, film, suffix):
    """In MP4 a late start is a pause, counted in a unit that must be fine enough."""
    late = ("-itsoffset", "0.137", "-i", film, "-map", "0:v", "-map", "1:a", "-c", "copy")
    source = ffmpeg("-i", film, *late, "-video_track_timescale", "25", tmp_path / "in.mp4")
    out = upscaled(source, tmp_path / f"out{suffix}", triton)
    before, after = sound_times(source), sound_times(out)
    assert len(before) == len(after)
    assert max(abs(a - b) for a, b in zip(after, before, strict=True)) <= Fraction(1, 1000)


def test_a_full_disk_is_not_taken_for_a_wrong_container(tmp_path, triton, film, monkeypatch):
    from mst_gan_client.video.mux import Muxer

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Muxer, "_write", full)
    line = refused(film, tmp_path / "out.mp4", triton)
    assert "No space left on device" in line
    assert "cannot hold" not in line


def test_another_picture_is_another_run(tmp_path, triton, film, monkeypatch):
    """What was done of one video stream is not continued with the frames of another."""
    from mst_gan_client.video.mux import Muxer

    source = ffmpeg("-i", film, *FILM, "-map", "0:v", "-map", "1:v", *H264, tmp_path / "in.mkv")
    out = tmp_path / "out.mkv"
    arguments = (source, out, "--url", triton.url, "--segment-frames", 3)
    with monkeypatch.context() as patch:
        patch.setattr(Muxer, "write", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "unplugged")))
        assert run_client(*arguments).exit_code == 1
    result = run_client(*arguments, "--streams", "1")
    assert result.exit_code == 1
    assert "holds an unfinished run with another picture" in result.output
