"""Everything a file holds beside pixels: times, streams, shape and tags come out as they went in."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition
from client_fakes import FakeTriton, decoded, frame_times, packets, pictures, run_client, write_clip

pytestmark = pytest.mark.slow

COUNT = 12


@pytest.fixture(scope="module")
def triton():
    with FakeTriton() as server:
        yield server


def upscaled(clip: Path, out: Path, triton: FakeTriton, *options: object) -> Path:
    result = run_client(clip, out, "--url", triton.url, "--segment-frames", 5, *options)
    assert result.exit_code == 0, result.output
    return out


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("b_frames", [0, 3])
def test_uneven_times_with_b_frames(tmp_path, triton, suffix, b_frames):
    pts = [5, 7, 8, 30, 31, 32, 90, 91, 200, 333, 334, 400]
    options = {"bf": str(b_frames), "b-adapt": "0"}
    times = {"pts": pts, "time_base": Fraction(1, 1000)}
    clip = write_clip(tmp_path / f"in{suffix}", pictures(COUNT), options=options, **times)
    out = upscaled(clip, tmp_path / f"out{suffix}", triton)
    assert frame_times(out) == frame_times(clip) == [Fraction(t, 1000) for t in pts]


def test_times_that_milliseconds_cannot_hold(tmp_path, triton):
    pts = [n * n * 1001 + 17 for n in range(COUNT)]
    clip = write_clip(
        tmp_path / "in.mp4",
        pictures(COUNT),
        pts=pts,
        time_base=Fraction(1, 30000),
        container_options={"movie_timescale": "30000"},
    )
    out = upscaled(clip, tmp_path / "out.mp4", triton)
    assert frame_times(out) == frame_times(clip) == [Fraction(t, 30000) for t in pts]


@pytest.mark.parametrize(
    ("suffix", "codec", "pix_fmt"), [(".avi", "mpeg4", "yuv420p"), (".ts", "libx264", "yuv420p")]
)
def test_containers_with_incomplete_times(tmp_path, triton, suffix, codec, pix_fmt):
    """AVI has decoding times only, a transport stream starts anywhere."""
    options = {"bf": "2"} if suffix == ".ts" else {}
    clip = write_clip(
        tmp_path / f"in{suffix}", pictures(COUNT), codec=codec, pix_fmt=pix_fmt, options=options
    )
    out = upscaled(clip, tmp_path / "out.mp4", triton)
    times = frame_times(out)
    assert len(times) == COUNT
    assert {later - earlier for earlier, later in pairwise(times)} == {Fraction(1, 25)}


def test_a_raw_stream_gets_even_times(tmp_path, triton):
    clip = write_clip(tmp_path / "in.h264", pictures(COUNT), options={"bf": "0"})
    out = upscaled(clip, tmp_path / "out.mp4", triton)
    times = frame_times(out)
    assert {later - earlier for earlier, later in pairwise(times)} == {Fraction(1, 25)}


def test_rotation_is_kept_and_pixels_are_not_turned(tmp_path, triton):
    clip = tmp_path / "in.mp4"
    with av.open(clip, "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height = 48, 32
        stream.set_display_matrix([0, 65536, 0, -65536, 0, 0, 32 * 65536, 0, 1 << 30])
        for image in pictures(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image)))
        container.mux(stream.encode(None))
    for suffix in (".mp4", ".mkv"):
        out = upscaled(clip, tmp_path / f"out{suffix}", triton)
        with av.open(clip) as before, av.open(out) as after:
            old, new = next(before.decode(video=0)), next(after.decode(video=0))
            assert new.rotation == old.rotation == -90
            assert (new.width, new.height) == (192, 128)
            if suffix == ".mp4":  # Matroska knows angles only
                turned = np.frombuffer(new.side_data["DISPLAYMATRIX"], np.int32)
                assert list(turned) == [0, 65536, 0, -65536, 0, 0, 128 * 65536, 0, 1 << 30]


@pytest.mark.parametrize("codec", ["h264", "hevc", "av1"])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 6])
def test_pieces_of_any_length_join(tmp_path, triton, codec, count):
    """Encoders begin and end every piece in their own way; libx265 has no times for the shortest."""
    clip = write_clip(tmp_path / "in.mp4", pictures(count, 48, 64))
    for length in (1, 2, 4):
        out = tmp_path / f"{length}.mp4"
        options = ("--codec", codec, "--segment-frames", length)
        assert run_client(clip, out, "--url", triton.url, *options).exit_code == 0
        assert frame_times(out) == frame_times(clip)


@pytest.mark.parametrize("preset", ["ultrafast", "veryslow"])
@pytest.mark.parametrize("codec", ["h264", "hevc"])
def test_presets_reorder_no_further_than_told(tmp_path, triton, codec, preset):
    clip = write_clip(tmp_path / "in.mp4", pictures(30, 48, 64))
    out = upscaled(clip, tmp_path / "out.mp4", triton, "--codec", codec, "--preset", preset)
    assert frame_times(out) == frame_times(clip)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_sample_aspect_ratio(tmp_path, triton, suffix):
    clip = tmp_path / f"in{suffix}"
    with av.open(clip, "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height = 48, 32
        stream.codec_context.sample_aspect_ratio = Fraction(16, 11)
        for image in pictures(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image)))
        container.mux(stream.encode(None))
    with av.open(upscaled(clip, tmp_path / f"out{suffix}", triton)) as after:
        assert after.streams.video[0].sample_aspect_ratio == Fraction(16, 11)


CHAPTERS = [
    {"id": 1, "start": 0, "end": 200, "time_base": Fraction(1, 1000), "metadata": {"title": "Before"}},
    {"id": 2, "start": 200, "end": 480, "time_base": Fraction(1, 1000), "metadata": {"title": "After"}},
]
SUBTITLES = "1\n00:00:00,040 --> 00:00:00,200\nHello\n\n2\n00:00:00,240 --> 00:00:00,400\nworld\n"


@pytest.fixture
def film(tmp_path):
    """A Matroska file with two sound tracks, subtitles, a font, chapters and tags."""
    english = write_clip(tmp_path / "english.mkv", pictures(COUNT), audio=True)
    french = write_clip(tmp_path / "french.mkv", pictures(COUNT, 16, 16), audio=True)
    subtitles = tmp_path / "subtitles.srt"
    subtitles.write_text(SUBTITLES)
    path = tmp_path / "film.mkv"
    with (
        av.open(english) as one,
        av.open(french) as two,
        av.open(subtitles) as text,
        av.open(path, "w") as out,
    ):
        picks = [
            (one, one.streams.audio[0], {"language": "eng", "title": "Sound"}, Disposition.default),
            (one, one.streams.video[0], {"title": "Picture"}, Disposition.default),
            (two, two.streams.audio[0], {"language": "fra"}, Disposition.comment),
            (text, text.streams.subtitles[0], {"language": "deu"}, Disposition.forced),
        ]
        copies = []
        for _, stream, tags, disposition in picks:
            copy = out.add_stream_from_template(stream, opaque=True)
            copy.metadata.update(tags)
            copy.disposition = disposition
            copies.append(copy)
        out.add_attachment("letters.ttf", "font/ttf", b"no real font" * 50)
        out.metadata["title"] = "A film"
        out.set_chapters(CHAPTERS)
        copy_of = {id(stream): copy for (_, stream, _, _), copy in zip(picks, copies, strict=True)}
        for source in (one, two, text):
            for packet in source.demux():
                if packet.size and id(packet.stream) in copy_of:
                    packet.stream = copy_of[id(packet.stream)]
                    out.mux(packet)
    return path


def shape(path):
    """All that a file says about itself, except for the picture's own codec."""
    with av.open(path) as container:
        return {
            "streams": [
                (
                    s.type,
                    s.name if s.type != "video" else "",
                    s.language,
                    s.metadata.get("title"),
                    s.disposition,
                )
                for s in container.streams
            ],
            "attachments": [
                (s.name, s.mimetype, s.data) for s in container.streams if s.type == "attachment"
            ],
            "chapters": [
                (c["start"] * c["time_base"], c["end"] * c["time_base"], c["metadata"]["title"])
                for c in container.chapters()
            ],
            "title": container.metadata.get("title"),
        }


def all_packets(path):
    """(stream, time, bytes) of every packet that is not the picture."""
    with av.open(path) as container:
        return sorted(
            (packet.stream.index, packet.pts * packet.time_base, bytes(packet))
            for packet in container.demux()
            if packet.size and packet.stream.type != "video"
        )


def test_every_stream_chapter_and_tag_is_kept(tmp_path, triton, film):
    out = upscaled(film, tmp_path / "out.mkv", triton)
    assert shape(out) == shape(film)
    assert all_packets(out) == all_packets(film)
    assert len(all_packets(film)) > 20
    assert frame_times(out) == frame_times(film)


def test_sound_chapters_and_tags_in_mp4(tmp_path, triton, film):
    """The same without what MP4 cannot hold."""
    source = tmp_path / "film.mp4"
    with av.open(film) as container, av.open(source, "w") as out:
        copies = {}
        for stream in container.streams:
            if stream.type in ("video", "audio"):
                copies[stream.index] = out.add_stream_from_template(stream, opaque=True)
                copies[stream.index].metadata["language"] = stream.language or "und"
        out.metadata["title"] = "A film"
        out.set_chapters(CHAPTERS)
        for packet in container.demux([container.streams[index] for index in copies]):
            if packet.size:
                packet.stream = copies[packet.stream.index]
                out.mux(packet)
    out = upscaled(source, tmp_path / "out.mp4", triton)
    kept = [stream for stream in shape(source)["streams"] if stream[0] in ("video", "audio")]
    assert [stream for stream in shape(out)["streams"] if stream[0] in ("video", "audio")] == kept
    assert len(kept) == 3
    assert shape(out)["chapters"] == shape(source)["chapters"]
    assert shape(out)["title"] == "A film"
    assert frame_times(out) == frame_times(source)


def test_subtitles_of_mp4(tmp_path, triton):
    """MP4 writes the pauses between subtitles as subtitles; copying must not multiply them."""
    header = (
        b"[V4+ Styles]\nFormat: Name, Fontname, Fontsize\nStyle: Default,Arial,16\n\n[Events]\nFormat: Text\n"
    )
    (tmp_path / "text.srt").write_text(SUBTITLES)
    picture = write_clip(tmp_path / "picture.mp4", pictures(COUNT), audio=True)
    source = tmp_path / "in.mp4"
    with av.open(tmp_path / "text.srt") as text, av.open(picture) as clip, av.open(source, "w") as out:
        copies = {stream: out.add_stream_from_template(stream, opaque=True) for stream in clip.streams}
        subtitles = out.add_stream("mov_text")
        subtitles.codec_context.time_base = Fraction(1, 1000)
        subtitles.codec_context.subtitle_header = header
        for packet in clip.demux():
            if packet.size:
                packet.stream = copies[packet.stream]
                out.mux(packet)
        for packet in text.demux():
            if packet.size:
                shown = packet.stream.codec_context.decode2(packet)
                encoded = subtitles.codec_context.encode_subtitle(shown)
                encoded.stream, encoded.time_base = subtitles, packet.time_base
                encoded.pts, encoded.dts, encoded.duration = packet.pts, packet.dts, packet.duration
                out.mux(encoded)
    out = upscaled(source, tmp_path / "out.mp4", triton)
    assert all_packets(out) == all_packets(source)
    assert b"\0\5Hello" in packets(out, "subtitle")


def test_a_container_that_cannot_hold_a_stream_is_refused_before_the_work(tmp_path, triton, film):
    before = triton.requests
    result = run_client(film, tmp_path / "out.mp4", "--url", triton.url)
    assert result.exit_code == 1
    assert f".mp4 files cannot hold stream 4 (attachment letters.ttf) of {film}" in result.output
    assert "name the output .mkv, or leave it out with --streams -4" in result.output
    assert triton.requests == before
    assert not (tmp_path / "out.mp4.part").exists()


def test_a_cover_is_copied_and_not_upscaled(tmp_path, triton):
    clip = write_clip(tmp_path / "clip.mkv", pictures(COUNT))
    cover = write_clip(tmp_path / "cover.png", pictures(1, 20, 20), codec="png", pix_fmt="rgb24")
    path = tmp_path / "in.mp4"
    with av.open(clip) as one, av.open(cover) as two, av.open(path, "w") as out:
        for source, disposition in ((two, Disposition.attached_pic), (one, Disposition.default)):
            copy = out.add_stream_from_template(source.streams.video[0], opaque=True)
            copy.disposition = disposition
        for index, source in enumerate((two, one)):
            for packet in source.demux(video=0):
                if packet.size:
                    packet.stream = out.streams[index]
                    out.mux(packet)
    out = upscaled(path, tmp_path / "out.mp4", triton)
    with av.open(out) as container:
        sizes = {
            bool(s.disposition & Disposition.attached_pic): (s.height, s.width) for s in container.streams
        }
        assert sizes == {True: (20, 20), False: (128, 192)}


def test_a_picture_that_starts_later_than_the_sound(tmp_path, triton):
    pts = [n + 7 for n in range(COUNT)]
    clip = write_clip(
        tmp_path / "in.mp4",
        pictures(COUNT),
        pts=pts,
        rate=Fraction(24000, 1001),
        audio=True,
        container_options={"movie_timescale": "24000"},
    )
    out = upscaled(clip, tmp_path / "out.mp4", triton)
    assert frame_times(clip)[0] == Fraction(7 * 1001, 24000)
    assert frame_times(out) == frame_times(clip)
    assert all_packets(out) == all_packets(clip)


def test_an_edit_list_is_applied(tmp_path, triton):
    """Frames before the start of an edit are decoded by nobody: the output has what a player shows."""
    whole = write_clip(tmp_path / "whole.mp4", pictures(COUNT), options={"bf": "0", "g": "12"})
    clip = tmp_path / "in.mp4"
    with (
        av.open(whole) as source,
        av.open(clip, "w", container_options={"avoid_negative_ts": "disabled"}) as out,
    ):
        copy = out.add_stream_from_template(source.streams.video[0], opaque=True)
        for packet in source.demux(video=0):
            if packet.size:
                packet.pts -= 4 * 512
                packet.dts -= 4 * 512
                packet.stream = copy
                out.mux(packet)
    shown = frame_times(clip)
    assert len(shown) == COUNT - 4
    out = upscaled(clip, tmp_path / "out.mp4", triton)
    assert frame_times(out) == shown
    assert len(decoded(out)) == len(decoded(clip))


def test_what_was_muxed_is_verified(tmp_path, triton, monkeypatch):
    """A muxer that loses a packet does not go unnoticed."""
    from mst_gan_client.video import mux

    copied = mux._copied
    monkeypatch.setattr(mux, "_copied", lambda *args: (p for i, p in enumerate(copied(*args)) if i != 3))
    clip = write_clip(tmp_path / "in.mp4", pictures(COUNT), audio=True)
    result = run_client(clip, tmp_path / "out.mp4", "--url", triton.url)
    assert result.exit_code == 1
    assert "is not right: expected" in result.output
    assert not (tmp_path / "out.mp4").exists()


def test_a_timecode_is_kept(tmp_path, triton, caplog):
    """MP4 has it in a stream, which the muxer makes from a tag."""
    clip = tmp_path / "in.mp4"
    with av.open(write_clip(tmp_path / "plain.mp4", pictures(COUNT))) as plain, av.open(clip, "w") as out:
        stream = out.add_stream_from_template(plain.streams.video[0], opaque=True)
        stream.metadata["timecode"] = "01:02:03:04"
        for packet in plain.demux(video=0):
            if packet.size:
                packet.stream = stream
                out.mux(packet)
    out = upscaled(clip, tmp_path / "out.mp4", triton)
    assert packets(out, "data") == packets(clip, "data")
    assert "left out" not in caplog.text


def test_what_is_left_out_is_named_once(tmp_path, triton, caplog):
    path = tmp_path / "in.mkv"
    with av.open(write_clip(tmp_path / "one.mkv", pictures(COUNT))) as one, av.open(path, "w") as out:
        copies = [out.add_stream_from_template(one.streams.video[0], opaque=True) for _ in range(2)]
        for packet in one.demux(video=0):
            if packet.size:
                packet.stream = copies[0]
                out.mux(packet)
    upscaled(path, tmp_path / "out.mkv", triton)
    assert [line for line in caplog.messages if "left out" in line] == ["left out stream 1 (video h264)"]
