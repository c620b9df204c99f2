"""A part of a clip, and other output sizes."""

from __future__ import annotations

from fractions import Fraction

import av
import numpy as np
import pytest
from client_fakes import (
    LOSSLESS,
    FakeTriton,
    decoded,
    frame_times,
    pictures,
    run_client,
    sum_of_window,
    write_clip,
)

from mst_gan_client.options import height_and_width, seconds

pytestmark = pytest.mark.slow

COUNT = 50


@pytest.fixture(scope="module")
def triton():
    with FakeTriton(network=sum_of_window) as server:
        yield server


@pytest.fixture
def clip(tmp_path):
    return write_clip(tmp_path / "in.mkv", pictures(COUNT), codec="ffv1", pix_fmt="bgr0", audio=True)


def upscaled(clip, triton, *options):
    out = clip.with_name("out.mkv")
    result = run_client(clip, out, "--url", triton.url, "--segment-frames", 6, "--overwrite", *options)
    assert result.exit_code == 0, result.output
    return out


@pytest.mark.parametrize(
    ("options", "first", "end"),
    [
        (("--start", "0.4"), 10, 50),
        (("--start", "0:00:00.41"), 11, 50),
        (("--duration", "0.2"), 0, 5),
        (("--start", "1", "--duration", "0.4"), 25, 35),
        (("--start", "1.9", "--duration", "9"), 48, 50),
        (("--max-frames", 7), 0, 7),
        (("--start", "0.4", "--max-frames", 1), 10, 11),
    ],
)
def test_the_range_is_a_clip_of_its_own(clip, triton, options, first, end):
    """Windows stay inside the range, its first frame has time zero."""
    out = upscaled(clip, triton, *LOSSLESS, *options)
    lr = decoded(clip)[first:end]
    edges = [lr[0], *lr, lr[-1]]
    expected = [sum_of_window(np.stack(edges[t : t + 3])[None])[0] for t in range(len(lr))]
    assert all((one == other).all() for one, other in zip(decoded(out), expected, strict=True))
    assert frame_times(out) == [Fraction(n, 25) for n in range(end - first)]


def test_sound_and_chapters_of_the_range(tmp_path, clip, triton):
    source = tmp_path / "chapters.mkv"
    with av.open(clip) as old, av.open(source, "w") as new:
        copies = {stream: new.add_stream_from_template(stream, opaque=True) for stream in old.streams}
        marks = ((0, 400, "a"), (400, 1200, "b"), (1200, 1300, "c"), (1300, 2000, "d"))
        tick = Fraction(1, 1000)
        new.set_chapters(
            [
                {"id": i, "start": start, "end": end, "time_base": tick, "metadata": {"title": title}}
                for i, (start, end, title) in enumerate(marks)
            ]
        )
        for packet in old.demux():
            if packet.size:
                packet.stream = copies[packet.stream]
                new.mux(packet)
    out = upscaled(source, triton, "--start", "1", "--duration", "0.28")

    def sound(path):
        with av.open(path) as container:
            return [(p.pts * p.time_base, bytes(p)) for p in container.demux(audio=0) if p.size]

    expected = [(time - 1, data) for time, data in sound(source) if 1 <= time < Fraction(128, 100)]
    assert sound(out) == expected
    assert len(expected) > 10
    with av.open(out) as container:
        found = container.chapters()
    chapters = [
        (c["start"] * c["time_base"], c["end"] * c["time_base"], c["metadata"]["title"]) for c in found
    ]
    assert chapters == [(0, Fraction(1, 5), "b"), (Fraction(1, 5), Fraction(28, 100), "c")]


def test_nothing_in_the_range(clip, triton):
    result = run_client(clip, clip.with_name("out.mkv"), "--url", triton.url, "--start", "7")
    assert result.exit_code == 1
    assert "Error: expected frames after 7 s, found the end of" in result.output


@pytest.mark.parametrize(
    ("size", "aspect"), [("96x64", None), ("144x96", None), ("96x96", Fraction(3, 2)), ("480x320", None)]
)
def test_final_size(clip, triton, size, aspect):
    out = upscaled(clip, triton, "--final-size", size, "--max-frames", 2)
    width, height = map(int, size.split("x"))
    with av.open(out) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height) == (width, height)
        assert (stream.sample_aspect_ratio or 1) == (aspect or 1)
        colors = next(container.decode(stream)).to_ndarray(format="rgb24")
    model = sum_of_window(np.stack([decoded(clip)[0]] * 2 + [decoded(clip)[1]])[None])[0]
    assert np.abs(colors.mean((0, 1)) - model.mean((0, 1))).max() < 3


@pytest.mark.parametrize(
    ("text", "value"),
    [("90", 90), ("1:30", 90), ("1:00:00.125", 3600 + Fraction(1, 8)), ("0.1", Fraction(1, 10))],
)
def test_times_are_exact(text, value):
    assert seconds(text) == value


def test_sizes_are_width_first():
    assert height_and_width("1920x1080") == (1080, 1920)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--start", "soon", "expected seconds or H:MM:SS, found 'soon'"),
        ("--duration", "-1", "expected seconds or H:MM:SS, found '-1'"),
        ("--final-size", "1080p", "expected WIDTHxHEIGHT, found '1080p'"),
        ("--max-frames", "0", "0 is not in the range"),
    ],
)
def test_wrong_values_are_usage_errors(clip, option, value, message):
    result = run_client(clip, clip.with_name("out.mkv"), option, value)
    assert result.exit_code == 2
    assert message in result.output
