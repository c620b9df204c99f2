"""Colors: what the server sees, and what a player is told, for every matrix and range."""

from __future__ import annotations

import av
import numpy as np
import pytest
from av.video.reformatter import ColorPrimaries, ColorRange, ColorTrc
from client_fakes import FakeTriton, decoded, nearest, pictures, run_client, write_clip

from mst_gan_client.video.color import BT470BG, BT709, BT2020_NCL, SMPTE170M, SMPTE240M, UNSPECIFIED

pytestmark = pytest.mark.slow

# The standards' own weights of red and blue in luma: the truth that swscale and our tags are held against.
LUMA = {
    BT709: (0.2126, 0.0722),
    BT470BG: (0.299, 0.114),
    SMPTE170M: (0.299, 0.114),
    SMPTE240M: (0.212, 0.087),
    BT2020_NCL: (0.2627, 0.0593),
}
BARS = np.array(
    [(r, g, b) for r in (235, 16) for g in (235, 16) for b in (235, 16)] + [(180, 120, 60), (60, 120, 180)],
    np.uint8,
)
BAR_PX = 16
COLOUR_BARS = np.tile(BARS.repeat(BAR_PX, axis=0), (32, 1, 1))  # (32, 160, 3)


def yuv_from_rgb(rgb, matrix, full_range, bits=8):
    """(..., 3) RGB 0..255 to rounded YCbCr by the formulas of BT.601, 709 and 2020."""
    red_weight, blue_weight = LUMA[matrix]
    red, green, blue = np.moveaxis(rgb / 255, -1, 0)
    luma = red_weight * red + (1 - red_weight - blue_weight) * green + blue_weight * blue
    chroma = [(blue - luma) / (2 * (1 - blue_weight)), (red - luma) / (2 * (1 - red_weight))]
    unit = 1 << (bits - 8)
    if full_range:
        top = 256 * unit - 1
        return np.stack([luma * top, *(c * top + 128 * unit for c in chroma)], -1).round()
    return np.stack([(16 + 219 * luma) * unit, *((128 + 224 * c) * unit for c in chroma)], -1).round()


def bars_clip(path, matrix, full_range, transfer=ColorTrc.BT709, primaries=ColorPrimaries.BT709):
    """Three lossless 4:4:4 frames of color bars, exact by the formulas, with tags; matrix None: untagged."""
    yuv = yuv_from_rgb(COLOUR_BARS, SMPTE170M if matrix is None else matrix, full_range)
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"qp": "0"})
        stream.height, stream.width, stream.pix_fmt = *COLOUR_BARS.shape[:2], "yuv444p"
        if matrix is not None:
            stream.colorspace, stream.color_range = matrix, 2 if full_range else 1
            stream.color_trc, stream.color_primaries = transfer, primaries
        for _ in range(3):
            frame = av.VideoFrame.from_ndarray(yuv.astype(np.uint8), "yuv444p", channel_last=True)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def tags(path):
    with av.open(path) as container:
        frame = next(container.decode(video=0))
        return frame.colorspace, frame.color_range, frame.color_primaries, frame.color_trc


def centers(image, scale=1):
    """One pixel from the middle of every bar, where chroma of the neighbors plays no part."""
    return image[image.shape[0] // 2, scale * BAR_PX // 2 :: scale * BAR_PX].astype(int)


class Eye:
    """A nearest-neighbor network that remembers what it was shown."""

    def __call__(self, windows):
        self.seen = windows[0, 1]
        return nearest(windows)


def run(clip, out, *options):
    eye = Eye()
    with FakeTriton(network=eye) as triton:
        result = run_client(clip, out, "--url", triton.url, *options)
    assert result.exit_code == 0, result.output
    return eye.seen


@pytest.mark.parametrize("full_range", [False, True], ids=["limited", "full"])
@pytest.mark.parametrize("matrix", LUMA)
def test_bars_round_trip(tmp_path, matrix, full_range):
    clip = bars_clip(tmp_path / "in.mp4", matrix, full_range)
    out = tmp_path / "out.mp4"
    seen = run(clip, out, "--pix-fmt", "yuv444p", "--crf", 0)
    assert np.abs(centers(seen) - BARS).max() <= 2
    assert tags(out) == tags(clip)
    assert tags(out)[:2] == (matrix, 2 if full_range else 1)
    hr = np.moveaxis(decoded(out, "yuv444p")[0], 0, -1)
    assert np.abs(centers(hr, 4) - yuv_from_rgb(BARS, matrix, full_range)).max() <= 2


@pytest.mark.parametrize(
    ("codec", "suffix"),
    [(codec, suffix) for codec in ("h264", "hevc", "av1") for suffix in (".mp4", ".mkv")]
    + [("prores", ".mov"), ("ffv1", ".mkv")],
)
def test_every_codec_carries_the_tags(tmp_path, codec, suffix):
    clip = bars_clip(tmp_path / "in.mp4", BT2020_NCL, False, ColorTrc.BT2020_10, ColorPrimaries.BT2020)
    out = tmp_path / f"out{suffix}"
    run(clip, out, "--codec", codec)
    assert tags(out) == tags(clip)


@pytest.mark.parametrize("pix_fmt", ["yuv420p10le", "yuv444p10le"])
def test_ten_bits(tmp_path, pix_fmt):
    clip = bars_clip(tmp_path / "in.mp4", BT709, False)
    out = tmp_path / "out.mp4"
    run(clip, out, "--codec", "hevc", "--pix-fmt", pix_fmt, "--crf", 4)
    with av.open(out) as container:
        frame = next(container.decode(video=0))
        assert frame.format.name == pix_fmt
        luma = np.frombuffer(frame.planes[0], np.uint16).reshape(128, -1)[:, :640]
    expected = yuv_from_rgb(BARS, BT709, False, bits=10)[:, 0]
    assert np.abs(luma[64, 32::64] - expected).max() <= 6


@pytest.mark.parametrize(("height", "matrix"), [(480, SMPTE170M), (576, SMPTE170M), (720, BT709)])
def test_an_untagged_clip_is_tagged_as_players_take_it(tmp_path, height, matrix):
    """Four times as large, an untagged SD clip would be taken for HD."""
    clip = write_clip(tmp_path / "in.mkv", pictures(1, height, 64), codec="ffv1", pix_fmt="yuv420p")
    assert tags(clip)[0] == UNSPECIFIED
    run(clip, tmp_path / "out.mkv")
    assert tags(tmp_path / "out.mkv")[:2] == (matrix, ColorRange.MPEG)


def test_rgb_in_and_yuv_out(tmp_path):
    clip = write_clip(tmp_path / "in.mov", [COLOUR_BARS] * 2, codec="png", pix_fmt="rgb24")
    out = tmp_path / "out.mp4"
    seen = run(clip, out, "--pix-fmt", "yuv444p", "--crf", 0)
    assert (seen == COLOUR_BARS).all()
    assert tags(out)[:2] == (BT709, ColorRange.MPEG)
    hr = np.moveaxis(decoded(out, "yuv444p")[0], 0, -1)
    assert np.abs(centers(hr, 4) - yuv_from_rgb(BARS, BT709, False)).max() <= 1


def test_grey_stays_grey(tmp_path):
    ramp = np.tile(np.arange(160, dtype=np.uint8)[None, :, None], (32, 1, 3))
    clip = write_clip(tmp_path / "in.mkv", [ramp] * 2, codec="ffv1", pix_fmt="gray")
    seen = run(clip, tmp_path / "out.mp4").astype(int)
    assert np.ptp(seen, axis=-1).max() <= 1
    assert np.abs(seen - decoded(clip)[0]).max() <= 2


@pytest.mark.parametrize("transfer", [ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67])
def test_hdr_is_refused_unless_allowed(tmp_path, transfer):
    clip = bars_clip(tmp_path / "in.mp4", BT2020_NCL, False, transfer, ColorPrimaries.BT2020)
    with FakeTriton() as triton:
        result = run_client(clip, tmp_path / "out.mp4", "--url", triton.url)
        assert result.exit_code == 1
        assert "expected a clip of standard dynamic range, found PQ or HLG" in result.output
        assert triton.requests == 0
    run(clip, tmp_path / "out.mp4", "--allow-hdr", "--codec", "hevc", "--pix-fmt", "yuv420p10le")
    assert tags(tmp_path / "out.mp4") == tags(clip)


def test_a_matrix_nobody_can_convert_is_refused(tmp_path, monkeypatch):
    constant_luminance = 10
    monkeypatch.setitem(LUMA, constant_luminance, LUMA[BT2020_NCL])  # only the tag matters here
    clip = bars_clip(tmp_path / "in.mp4", constant_luminance, False)
    with FakeTriton() as triton:
        result = run_client(clip, tmp_path / "out.mp4", "--url", triton.url)
    assert result.exit_code == 1
    assert "found H.273 code 10: convert the clip first" in result.output
