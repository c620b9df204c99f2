"""Synthetic line art that is trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from export.data import line_art
from export.data.clips import Clip
from export.data.line_art import CANVAS, MOTIFS, SIDE, draw, draw_all
from export.data.windows import WindowSampler


@pytest.fixture(scope="module")
def drawings() -> list[np.ndarray]:
    return [draw(seed) for seed in range(8)]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise in place of drawings, for what does not depend on what is drawn."""

    def noise(seed: int) -> np.ndarray:
        return np.random.default_rng(seed).integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)

    monkeypatch.setattr(line_art, "draw", noise)


def test_a_drawing_is_a_photo_and_always_the_same(
    tmp_path: Path, drawings: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = draw_all(2, tmp_path)
    assert [clip.segments.shape for clip in few] == [(1, 1, SIDE, SIDE, 3)] * 2
    assert all(clip.segments.dtype == np.uint8 for clip in few)
    for clip, drawing in zip(few, drawings, strict=False):
        assert np.array_equal(clip.segments[0, 0], drawing)
    assert not np.array_equal(drawings[0], drawings[1])
    assert draw_all(0, tmp_path) == []
    monkeypatch.setattr(line_art, "draw", None)  # what was drawn once is not drawn again
    assert np.array_equal(draw_all(2, tmp_path)[1].segments, few[1].segments)
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.usefixtures("quick")
def test_drawings_have_their_share_however_many_they_are(tmp_path: Path) -> None:
    photos = [Clip("photo", np.zeros((1, 1, 128, 128, 3), np.uint8))] * 2
    for count in (1, 5):
        stills = [*photos, *draw_all(count, tmp_path, photos=2)]
        sampler = WindowSampler(photos, stills, patch=64, photo_share=1.0, seed=0)
        drawn = [window.photo for step in range(40) for window in sampler.sample(step, 10)[1]]
        assert (np.array(drawn) >= 2).mean() == pytest.approx(line_art.SHARE, abs=0.08)


def test_every_drawing_has_something_to_learn(drawings: list[np.ndarray]) -> None:
    assert min(drawing.std() for drawing in drawings) > 6  # a sampler's flattest crop


@pytest.mark.parametrize("motif", sorted(set(MOTIFS), key=lambda motif: motif.__name__))
def test_every_motif_leaves_its_mark(motif: line_art.Motif) -> None:
    for seed in range(3):
        mask = Image.new("L", (CANVAS, CANVAS))
        motif(ImageDraw.Draw(mask), np.random.default_rng(seed))
        covered = np.asarray(mask).mean() / 255
        assert 0.0005 < covered < 0.95


def test_lines_are_smooth_edged_and_thin_ones_are_there(drawings: list[np.ndarray]) -> None:
    """Edges pass through grays, as after a lens; the finest structure is a few pixels wide."""
    jumps = [np.abs(np.diff(drawing.astype(int), axis=1)).max() for drawing in drawings]
    assert max(jumps) > 60
    spectra = [np.abs(np.fft.rfft2(drawing.mean(2))) for drawing in drawings]
    fine = [spectrum[:, SIDE // 16 :].sum() / spectrum.sum() for spectrum in spectra]
    assert max(fine) > 0.2  # of finer than 16 hr pixels


@pytest.mark.usefixtures("quick")
def test_drawings_are_moved_as_photos_are_and_some_not_at_all(tmp_path: Path) -> None:
    stills = draw_all(2, tmp_path)
    batch = WindowSampler(stills, stills, patch=64, photo_share=1.0, seed=0).batch(0, 24)
    assert batch.shape == (24, 3, 3, 64, 64)
    before, centre, after = batch.unbind(1)
    stands = (before == centre).flatten(1).all(1) & (after == centre).flatten(1).all(1)
    assert 2 <= stands.sum() <= 14  # of 24, at a share of 0.3
