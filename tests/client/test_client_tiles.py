"""Tiles: equal shapes that cover the frame, and no seams where they meet."""

from __future__ import annotations

import json
import time
from itertools import pairwise

import numpy as np
import pytest
from client_fakes import LOSSLESS, FakeTriton, decoded, ensemble_config, pictures, run_client, write_clip

from mst_gan_client.frames.tiles import OVERLAP_PX, Grid, grid_for

RADIUS_PX = 6  # how far ``blur`` looks


def blur(windows):
    """A network with context: every pixel is the mean of 13x13 around it, four times each way."""
    center = windows[0, 1].astype(np.float64)
    for axis in (0, 1):
        padding = [(RADIUS_PX + 1, RADIUS_PX) if a == axis else (0, 0) for a in range(3)]
        sums = np.cumsum(np.pad(center, padding, mode="edge"), axis)
        size = 2 * RADIUS_PX + 1
        ends = np.take(sums, range(size, sums.shape[axis]), axis)
        center = (ends - np.take(sums, range(sums.shape[axis] - size), axis)) / size
    return np.rint(center).astype(np.uint8).repeat(4, 0).repeat(4, 1)[None]


@pytest.mark.parametrize("multiple_of", [4, 16])
@pytest.mark.parametrize("most", [64, 180, 720])
def test_tiles_cover_every_length(multiple_of, most):
    for length in range(multiple_of, 2000, multiple_of):
        grid = grid_for((length, 64), (most, 64), multiple_of)
        side, starts = grid.tile[0], grid.tops
        assert side <= most and side % multiple_of == 0
        assert starts[0] == 0 and starts[-1] + side == length
        overlap = min(OVERLAP_PX, most // multiple_of * multiple_of // 4)
        assert all(0 < later - earlier <= side - overlap for earlier, later in pairwise(starts))


def test_a_frame_that_fits_is_one_tile():
    assert grid_for((720, 1280), (720, 1280), 4).count == 1


def test_a_standing_frame_is_cut_where_it_is_too_high():
    grid = grid_for((1280, 720), (720, 1280), 4)
    assert (grid.tile, grid.lefts, len(grid.tops)) == ((672, 720), (0,), 2)


def test_what_is_split_is_merged():
    rng = np.random.default_rng(3)
    window = rng.integers(0, 256, (3, 200, 332, 3), np.uint8)
    grid = grid_for((200, 332), (96, 128), 4)
    tiles = list(grid.split(window))
    assert len(tiles) == grid.count == 12
    assert {tile.shape for tile in tiles} == {(3, *grid.tile, 3)}
    hr_tiles = [tile[1].repeat(4, 0).repeat(4, 1) for tile in tiles]
    assert (grid.merge(hr_tiles, 4) == window[1].repeat(4, 0).repeat(4, 1)).all()


def upscaled(tmp_path, images, max_size, network):
    clip = write_clip(tmp_path / "in.mkv", images, codec="ffv1", pix_fmt="bgr0")
    out = tmp_path / f"{max_size}.mkv"
    with FakeTriton(network=network, config=ensemble_config(max_size=max_size)) as triton:
        result = run_client(clip, out, "--url", triton.url, *LOSSLESS)
    assert result.exit_code == 0, result.output
    return decoded(out), set(triton.shapes)


@pytest.mark.parametrize(("height", "width"), [(200, 130), (131, 301), (300, 300)])
def test_no_seams(tmp_path, height, width):
    """A network that looks no further than the overlap gives the same in tiles and in one piece."""
    noise = np.random.default_rng(4).integers(0, 256, (2, height, width, 3), np.uint8)
    whole, _ = upscaled(tmp_path, list(noise), "720x1280", blur)
    tiled, shapes = upscaled(tmp_path, list(noise), "128x128", blur)
    assert len(shapes) == 1
    for one, other in zip(tiled, whole, strict=True):
        assert np.abs(one.astype(int) - other).max() <= 1


def test_putting_tiles_together_is_no_inference(tmp_path, monkeypatch):
    merge = Grid.merge

    def slowly(*arguments):
        time.sleep(0.05)
        return merge(*arguments)

    monkeypatch.setattr(Grid, "merge", slowly)
    clip = write_clip(tmp_path / "in.mkv", pictures(10, 32, 192))
    with FakeTriton(config=ensemble_config(max_size="32x128")) as triton:
        result = run_client(clip, tmp_path / "out.mkv", "--url", triton.url, "--json")
    stages_s = json.loads(result.stdout.splitlines()[-1])["stages_s"]
    assert stages_s["transfer"] >= 0.5 and stages_s["inference"] < stages_s["transfer"]


def test_tiles_that_disagree_are_blended(tmp_path):
    """A network that answers tile by tile with another gray: the steps between tiles are spread out."""
    answers = iter(range(0, 240, 60))  # the first one is for the probe

    def greys(windows):
        _, _, height, width, _ = windows.shape
        return np.full((1, 4 * height, 4 * width, 3), next(answers), np.uint8)

    (frame,), _ = upscaled(tmp_path, pictures(1, 32, 192), "32x128", greys)
    row = frame[0, :, 0].astype(int)
    assert sorted((row[0], row[-1])) == [60, 120]  # both tiles are asked for at once
    assert np.abs(np.diff(row)).max() == 1
