"""Bicubic beside ours."""

from __future__ import annotations

import av
import numpy as np
import pytest
from client_fakes import LOSSLESS, decoded, frame_times, nearest, pictures, run_client, write_clip

from mst_gan_client.reports.compare import detail, resized


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
