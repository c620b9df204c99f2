"""Bicubic beside ours."""

from __future__ import annotations

from fractions import Fraction

import av
import numpy as np
import pytest
from client_fakes import LOSSLESS, decoded, frame_times, nearest, pictures, run_client, write_clip
from ffmpeg import FILM, ffmpeg

from mst_gan_client.reports.compare import detail, resized, upright, upright_size
from mst_gan_client.reports.html_report import JFIF
from mst_gan_client.video.picture import Picture


@pytest.fixture
def clip(tmp_path):
    return write_clip(tmp_path / "in.mkv", pictures(9), codec="ffv1", pix_fmt="bgr0")


def test_a_picture_of_samples(tmp_path, clip, triton):
    """Three rows: bicubic, ours, and the detail of each that differs most."""
    target = tmp_path / "compare.png"
    options = ("--url", triton.url, *LOSSLESS, "--compare", target)
    result = run_client(clip, tmp_path / "out.mkv", *options)
    assert result.exit_code == 0, result.output
    (sheet,) = decoded(target)
    assert sheet.shape[0] == 3 * 128 + 2 * 4
    for row, index in enumerate((1, 4, 7)):
        lr = pictures(9)[index]
        top = sheet[row * 132 : row * 132 + 128]
        assert (top[:, :192] == resized(lr, (128, 192))).all()
        assert (top[:, 192:196] == 255).all()
        assert (top[:, 196:388] == nearest(lr[None, None].repeat(3, 1))[0]).all()
        assert top.shape[1] > 388 + 2 * 100


def test_a_video_split_in_the_middle(tmp_path, clip, triton):
    target, out = tmp_path / "compare.mp4", tmp_path / "out.mkv"
    options = ("--url", triton.url, *LOSSLESS, "--start", "0.08", "--compare", target)
    assert run_client(clip, out, *options).exit_code == 0
    assert frame_times(target) == frame_times(out)
    for split, hr, lr in zip(decoded(target), decoded(out), pictures(9)[2:], strict=True):
        bicubic = resized(lr, (128, 192)).astype(int)
        assert np.abs(split[:, :90] - bicubic[:, :90]).mean() < 4
        assert np.abs(split[:, 102:] - hr[:, 102:].astype(int)).mean() < 4
        assert split[:, 95:97].min() > 230


@pytest.mark.parametrize("name", ["compare.png", "compare.mp4"])
def test_a_turned_clip_is_shown_as_players_show_it(tmp_path, clip, triton, name):
    turned = tmp_path / "turned.mkv"
    with av.open(clip) as source, av.open(turned, "w") as out:
        stream = out.add_stream_from_template(source.streams.video[0], opaque=True)
        stream.set_display_matrix((0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30))  # clockwise
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                out.mux(packet)
    target = tmp_path / name
    options = ("--url", triton.url, *LOSSLESS, "--compare", target)
    assert run_client(turned, tmp_path / "out.mkv", *options).exit_code == 0
    frame = decoded(target)[0]
    lr = np.rot90(pictures(9)[1 if name.endswith("png") else 0], -1)
    bicubic = resized(np.ascontiguousarray(lr), (192, 128)).astype(int)
    assert np.abs(frame[:192, :60] - bicubic[:, :60]).mean() < 4


MATRICES = {
    "clockwise": ((0, 1, -1, 0), lambda image: np.rot90(image, -1)),
    "upside down": ((-1, 0, 0, -1), lambda image: np.rot90(image, 2)),
    "mirrored": ((-1, 0, 0, 1), np.fliplr),
    "flipped": ((1, 0, 0, -1), np.flipud),
    "transposed": ((0, 1, 1, 0), lambda image: image.transpose(1, 0, 2)),
}


@pytest.mark.parametrize("name", MATRICES)
def test_pictures_are_turned_and_mirrored_as_players_do(name):
    (a, b, c, d), expected = MATRICES[name]
    one = 1 << 16
    matrix = (a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30)
    image = pictures(1, 6, 10)[0]
    picture = Picture((6, 10), Fraction(25), Fraction(1, 25), JFIF, None, matrix)
    np.testing.assert_array_equal(upright(image, picture), expected(image))
    assert upright_size(picture) == expected(image).shape[:2]


def shown_by_ffmpeg(clip, *options):
    raw = ffmpeg("-i", clip, *options, "-f", "rawvideo", "-pix_fmt", "rgb24", clip.with_suffix(".rgb"))
    return np.frombuffer(raw.read_bytes(), np.uint8)


def test_a_mirrored_clip_is_shown_as_ffmpeg_shows_it(tmp_path, clip, triton):
    turned = ffmpeg("-display_hflip", "-display_rotation", "90", "-i", clip, "-c", "copy", tmp_path / "t.mkv")
    target = tmp_path / "compare.mkv"
    options = ("--url", triton.url, *LOSSLESS, "--compare", target)
    assert run_client(turned, tmp_path / "out.mkv", *options).exit_code == 0
    expected = shown_by_ffmpeg(turned, "-frames:v", "1").reshape(48, 32, 3)
    frame = decoded(target)[0].astype(int)
    assert frame.shape == (192, 128, 3)
    assert np.abs(frame[2::4, 2::4][:, :14] - expected[:, :14]).mean() < 6
    assert np.abs(frame[2::4, 2::4][:, 18:] - expected[:, 18:]).mean() < 6


def two_pictures(tmp_path):
    """A dark and a light stream; without --streams, the first is upscaled."""
    dark, light = (
        write_clip(tmp_path / f"{level}.mkv", flat(level), codec="ffv1", pix_fmt="bgr0")
        for level in (40, 200)
    )
    return ffmpeg("-i", dark, "-i", light, "-map", "0", "-map", "1", "-c", "copy", tmp_path / "two.mkv")


def flat(level, count=6):
    return [np.full((32, 48, 3), level, np.uint8)] * count


def test_the_stream_that_was_upscaled_is_the_one_that_is_compared(tmp_path, triton):
    extras = ("--compare", tmp_path / "c.mkv", "--report", tmp_path / "r.html")
    out = tmp_path / "out.mkv"
    result = run_client(
        two_pictures(tmp_path), out, "--url", triton.url, "--streams", "1", *LOSSLESS, *extras
    )
    assert result.exit_code == 0, result.output
    for frame in decoded(tmp_path / "c.mkv"):
        assert np.abs(frame[:, :90].astype(int) - 200).max() <= 3


def interlaced(tmp_path):
    """Fields that differ from each other and from frame to frame: lines, unless they are deinterlaced."""
    rows = np.where(np.arange(32) % 2, 60, 180).astype(np.uint8)
    images = [np.repeat((240 - rows if t % 2 else rows)[:, None, None], 48, 1).repeat(3, 2) for t in range(6)]
    return write_clip(tmp_path / "fields.mkv", images, codec="ffv1", pix_fmt="bgr0")


def test_deinterlaced_frames_are_compared(tmp_path, triton):
    """Both halves begin with what the model was given."""
    out, target = tmp_path / "out.mkv", tmp_path / "c.mkv"
    options = ("--url", triton.url, "--deinterlace", "on", *LOSSLESS, "--compare", target)
    result = run_client(interlaced(tmp_path), out, *options)
    assert result.exit_code == 0, result.output
    hr, split = decoded(out)[2].astype(int), decoded(target)[2].astype(int)
    lr = hr[2::4, 2::4].astype(np.uint8)
    assert np.abs(split[:, :90] - resized(lr, (128, 192))[:, :90]).mean() < 4


def test_what_was_said_of_a_clip_is_not_said_again(tmp_path, triton, caplog):
    source = ffmpeg(
        *FILM,
        "-vf",
        "setfield=tff,interlace",
        "-c:v",
        "mpeg2video",
        "-flags",
        "+ilme+ildct",
        tmp_path / "in.mkv",
    )
    extras = ("--compare", tmp_path / "c.png", "--report", tmp_path / "r.html")
    result = run_client(source, tmp_path / "out.mkv", "--url", triton.url, *extras)
    assert result.exit_code == 0, result.output
    assert caplog.text.count("interlaced frames are upscaled as they are") == 1


def test_the_detail_is_where_the_images_differ():
    before = np.zeros((60, 90, 3), np.uint8)
    after = before.copy()
    after[22:28, 63:69] = 200
    small_before, small_after = detail(before, after)
    assert small_before.shape == small_after.shape == (60, 60, 3)
    assert (small_after == after[20:30, 60:70].repeat(6, 0).repeat(6, 1)).all()


def test_what_cannot_be_compared(tmp_path, clip, triton):
    result = run_client(clip, tmp_path / "out.mkv", "--url", triton.url, "--compare", tmp_path / "c.xyz")
    assert result.exit_code == 1
    assert "expected a .png, .mp4, .mkv or .mov for --compare, found" in result.output
    assert triton.requests == 0
    folder = tmp_path / "folder.png"
    folder.mkdir()
    result = run_client(clip, tmp_path / "out.mkv", "--url", triton.url, "--compare", folder)
    assert result.exit_code == 1
    assert "cannot write the comparison" in result.output
    result = run_client(clip, "-", "--url", triton.url, "--compare", tmp_path / "c.png")
    assert "expected one clip from a file to a file for --compare and --report" in result.output
