"""A range, or a run that goes on, begins at a key frame, and gives what decoding from the start gives."""

from __future__ import annotations

from fractions import Fraction

import av
import numpy as np
import pytest
from client_fakes import FakeTriton, decoded, pictures, run_client, sum_of_window, write_clip

import mst_gan_client.video.decode as decode
from mst_gan_client.record import Record, checksum
from mst_gan_client.video.decode import Video
from mst_gan_client.video.picture import Range
from mst_gan_client.video.source import Source

pytestmark = pytest.mark.slow

COUNT = 96
X264 = {"g": "24", "bf": "3", "x264-params": "b-pyramid=normal:scenecut=0:ref=4"}
UNEVEN = [7 * t + t % 3 + 40 * (t > 50) for t in range(COUNT)]  # ms

# name: suffix, encoder, pixel format, options, more arguments
OPEN = {**X264, "x264-params": X264["x264-params"] + ":open-gop=1"}
REFRESH = {"g": "24", "x264-params": "intra-refresh=1:bframes=0"}
VARIABLE = {"pts": UNEVEN, "time_base": Fraction(1, 1000)}
X265 = "keyint=24:min-keyint=24:bframes=4:log-level=error:open-gop="
FRAGMENTED = {"container_options": {"movflags": "frag_keyframe+empty_moov"}}
VP9 = {"g": "24", "deadline": "realtime", "cpu-used": "8", "lag-in-frames": "16", "auto-alt-ref": "1"}
LATE = {"pts": [t + 30 for t in range(COUNT)]}

# name: suffix, encoder, pixel format, options, more arguments
CLIPS = {
    "h264 mp4": (".mp4", "libx264", "yuv420p", X264, {}),
    "h264 mp4 open groups": (".mp4", "libx264", "yuv420p", OPEN, {}),
    "h264 mkv open groups": (".mkv", "libx264", "yuv420p", OPEN, {}),
    "h264 mp4 intra refresh": (".mp4", "libx264", "yuv420p", REFRESH, {}),
    "h264 mkv intra refresh": (".mkv", "libx264", "yuv420p", REFRESH, {}),
    "h264 mov variable rate": (".mov", "libx264", "yuv420p", X264, VARIABLE),
    "h264 mkv variable rate": (".mkv", "libx264", "yuv420p", X264, VARIABLE),
    "h264 mp4 starts late": (".mp4", "libx264", "yuv420p", X264, LATE),
    "h264 mp4 fragmented": (".mp4", "libx264", "yuv420p", X264, FRAGMENTED),
    "h264 ts": (".ts", "libx264", "yuv420p", X264, {}),
    "h264 flv": (".flv", "libx264", "yuv420p", X264, {}),
    "h264 one group": (".mp4", "libx264", "yuv420p", {"g": "1000", "x264-params": "scenecut=0"}, {}),
    "hevc mp4": (".mp4", "libx265", "yuv420p", {"x265-params": X265 + "0"}, {}),
    "hevc mkv open groups": (".mkv", "libx265", "yuv420p", {"x265-params": X265 + "1"}, {}),
    "hevc mp4 open groups": (".mp4", "libx265", "yuv420p", {"x265-params": X265 + "1"}, {}),
    "vp9 webm": (".webm", "libvpx-vp9", "yuv420p", VP9, {}),
    "av1 mp4": (".mp4", "libsvtav1", "yuv420p", {"g": "24", "preset": "10"}, {}),
    "mpeg2 ts": (".ts", "mpeg2video", "yuv420p", {"g": "12", "bf": "2"}, {}),
    "mpeg2 mkv": (".mkv", "mpeg2video", "yuv420p", {"g": "12", "bf": "2"}, {}),
    "mpeg4 avi": (".avi", "mpeg4", "yuv420p", {"g": "24"}, {}),
    "mpeg4 mp4": (".mp4", "mpeg4", "yuv420p", {"g": "24", "bf": "2"}, {}),
    "prores mov": (".mov", "prores_ks", "yuv422p10le", {}, {}),
    "ffv1 mkv": (".mkv", "ffv1", "bgr0", {"g": "12"}, {}),
    "png mov": (".mov", "png", "rgb24", {}, {}),
    "mjpeg avi": (".avi", "mjpeg", "yuvj420p", {}, {}),
}
SEEKABLE = {".mp4", ".mkv", ".mov", ".webm"}


def moving(count):
    """Frames in which each depends on the one before it, for encoders that predict."""
    rng = np.random.default_rng(3)
    noise = rng.integers(0, 256, (32, 48, 3), np.uint8)
    return [np.roll(noise, (t, 2 * t), (0, 1)) // 2 + image // 2 for t, image in enumerate(pictures(count))]


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    made = {}

    def clip(name):
        if name not in made:
            suffix, codec, pix_fmt, options, more = CLIPS[name]
            path = folder / f"{len(made)}{suffix}"
            more = {"codec": codec, "pix_fmt": pix_fmt, "options": options, **more}
            made[name] = write_clip(path, moving(COUNT), **more)
        return made[name]

    return clip


def frames_of(path, wanted=None, known=None, skip=0):
    """(pts, checksum) of the frames of a range, the frames decoded, and how many frames the decoder gave."""
    with Video(Source(path)) as video:
        arguments = (known, skip) if known else ()
        frames = video.frames(wanted or Range(), *arguments)
        found = [(frame.pts, checksum(frame.image)) for frame in frames]
        assert video.what_is_missing() is None
        return found, video


@pytest.fixture
def decoded_frames(monkeypatch):
    """Counts frames that decoders gave to the seeking part."""
    used = []
    original = decode.seek

    def counted(*arguments):
        found = original(*arguments)
        used.append(found)
        return found

    monkeypatch.setattr(decode, "seek", counted)
    return used


@pytest.mark.parametrize("name", CLIPS)
def test_a_range_is_what_decoding_from_the_start_gives(clips, name, monkeypatch, decoded_frames):
    path = clips(name)
    with Video(Source(path)) as video:
        time_base = video.picture.time_base
    with monkeypatch.context() as patch:
        patch.setattr(decode, "seek", lambda *_: None)
        whole, _ = frames_of(path)
        assert len(whole) >= COUNT - 1
    first = whole[0][0]
    for number, index in enumerate((1, 12, 13, 23, 24, 25, 26, 27, 30, 48, 49, 71, 94)):
        start_s = (whole[index][0] - first) * time_base
        few = 5 * time_base
        wanted = (Range(start_s), Range(start_s, frames=3), Range(start_s, duration_s=few))[number % 3]
        found, _ = frames_of(path, wanted)
        expected = [
            (pts, crc)
            for pts, crc in whole[index:]
            if wanted.duration_s is None or (pts - first) * time_base - start_s < few
        ]
        assert found == expected[: wanted.frames], f"from frame {index}"


@pytest.mark.parametrize("name", [name for name in CLIPS if CLIPS[name][0] in SEEKABLE])
def test_it_does_not_decode_what_comes_before(clips, name, decoded_frames):
    path = clips(name)
    with Video(Source(path)) as video:
        first, time_base = next(video.frames(Range())).pts, video.picture.time_base
    start_s = Fraction(92, 25) if "variable" not in name else Fraction(UNEVEN[92], 1000)
    found, _ = frames_of(path, Range(start_s))
    assert 1 <= len(found) <= 6
    (used,) = decoded_frames
    if "one group" in name or "intra refresh" in name:
        assert used is None  # no key frame to begin at, or one that is not whole
    else:
        assert used and (used.key_pts - first) * time_base >= start_s - 1


@pytest.mark.parametrize("name", [name for name in CLIPS if CLIPS[name][0] in SEEKABLE])
def test_a_run_that_goes_on(clips, name, decoded_frames):
    """From any frame, with what an earlier run knows; and with what does not fit, from the start."""
    path = clips(name)
    known = Record()
    with Video(Source(path)) as video:
        for frame in video.frames(Range()):
            known.add(frame.pts, frame.image, video.damaged, video.refused)
        packets = video._packets
    whole = list(zip(known.pts, known.checksums, strict=True))
    for skip in (1, 22, 23, 24, 25, 48, 50, 93, 95):
        found, video = frames_of(path, Range(), known.part(0, skip + 1), skip)
        assert found == whole[skip:]
    decoded_frames.clear()
    other = known.part(0, 80)
    other.checksums[79] ^= 1
    found, video = frames_of(path, Range(), other, 79)
    assert found == whole[79:]  # the caller compares, and says so
    assert video._packets == packets  # decoded from the start


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_an_edit_list(tmp_path, suffix):
    """A copy that begins in the middle of a group of pictures, as ``ffmpeg -ss -c copy`` makes it."""
    whole = write_clip(
        tmp_path / f"whole{suffix}", moving(COUNT), codec="libx264", pix_fmt="yuv420p", options=X264
    )
    path = tmp_path / f"cut{suffix}"
    with av.open(whole) as source, av.open(path, "w") as out:
        stream = source.streams.video[0]
        copy = out.add_stream_from_template(stream, opaque=True)
        shift = round(Fraction(10, 25) / stream.time_base)  # frame 10 is shown at 0, those before it never
        for packet in source.demux(stream):
            if packet.size:
                packet.stream = copy
                packet.pts -= shift
                packet.dts = None if packet.dts is None else packet.dts - shift
                out.mux(packet)
    expected, video = frames_of(path)
    first, tick = expected[0][0], video.picture.time_base
    for index in (3, 14, 20, 38, 40, 70):
        start_s = (expected[index][0] - first) * tick
        assert frames_of(path, Range(start_s))[0] == expected[index:]


@pytest.mark.parametrize(
    "name", ["h264 mp4", "h264 mkv open groups", "hevc mp4 open groups", "ffv1 mkv", "h264 ts"]
)
def test_the_whole_way(tmp_path, clips, name, monkeypatch):
    """A run that ended and goes on gives bit for bit what an undisturbed run gives, its record too."""
    import mst_gan_client.run as run

    clip = clips(name)
    options = ("--segment-frames", 30, "--codec", "ffv1", "--start", "0.4")
    write = run.write_segment

    def limited(path, *arguments):
        if path.stem == "000002":
            raise OSError(28, "No space left on device")
        return write(path, *arguments)

    with FakeTriton(network=sum_of_window) as triton:
        calm = run_client(clip, tmp_path / "calm.mkv", "--url", triton.url, *options)
        assert calm.exit_code == 0, calm.output
        with monkeypatch.context() as patch:
            patch.setattr(run, "write_segment", limited)
            assert run_client(clip, tmp_path / "out.mkv", "--url", triton.url, *options).exit_code == 1
        result = run_client(clip, tmp_path / "out.mkv", "--url", triton.url, *options)
        assert result.exit_code == 0, result.output
    one, other = decoded(tmp_path / "calm.mkv"), decoded(tmp_path / "out.mkv")
    assert len(one) == COUNT - 10
    assert all((a == b).all() for a, b in zip(one, other, strict=True))


def broken(clip, path, numbers):
    """Copy a clip of PNG pictures, some of them broken."""
    with av.open(clip) as source, av.open(path, "w") as out:
        copy = out.add_stream_from_template(source.streams.video[0], opaque=True)
        for index, packet in enumerate(p for p in source.demux(video=0) if p.size):
            new = packet
            if index in numbers:
                new = av.Packet(b"x" * packet.size)
                new.pts, new.dts, new.time_base = packet.pts, packet.dts, packet.time_base
                new.duration, new.is_keyframe = packet.duration, packet.is_keyframe
            new.stream = copy
            out.mux(new)
    return path


@pytest.mark.parametrize("numbers", [{5}, {40}, {5, 40, 80}])
def test_what_cannot_be_decoded_is_counted_over_an_end(tmp_path, clips, numbers, monkeypatch):
    """What the run before met counts, although it is not decoded again."""
    import mst_gan_client.run as run

    clip = broken(clips("png mov"), tmp_path / "in.mov", numbers)
    out = tmp_path / "out.mkv"
    write = run.write_segment

    def limited(path, *arguments):
        if path.stem == "000002":
            raise OSError(28, "No space left on device")
        return write(path, *arguments)

    with FakeTriton() as triton:
        arguments = (clip, out, "--url", triton.url, "--segment-frames", 15)
        with monkeypatch.context() as patch:
            patch.setattr(run, "write_segment", limited)
            assert run_client(*arguments).exit_code == 1
        result = run_client(*arguments)
        assert result.exit_code == 1
        assert f"the file has {len(numbers)} frames that cannot be decoded" in result.output
        assert run_client(*arguments, "--allow-damage").exit_code == 0
    assert len(decoded(out)) == COUNT - len(numbers)
