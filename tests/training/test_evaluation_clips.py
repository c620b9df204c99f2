"""Whole clips to be scored: videos, and test sets as Vid4, REDS4 and UDM10 are published."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from made_up_footage import write_sequence, write_video

from export.data.evaluation_clips import EvaluationClip, find_sources, load_evaluation_clip
from export.errors import ExportError


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    """4 frames, 48x66: noise that brightens by 10 levels a frame."""
    noise = np.random.default_rng(0).integers(0, 100, (48, 66, 3), dtype=np.uint8)
    return np.stack([noise + 10 * t for t in range(4)]).astype(np.uint8)


def load(folder: Path, **options: object) -> list[EvaluationClip]:
    sources = find_sources(folder, lr_folder=options.pop("lr_folder", None))  # type: ignore[arg-type]
    return [load_evaluation_clip(source, folder.parent / "cache", **options) for source in sources]  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", ["plain", "above", "inside"])
def test_every_published_layout_is_read(layout: str, tmp_path: Path, frames: np.ndarray) -> None:
    root = tmp_path / "set"
    for clip in ("city", "walk"):
        folder, lr = {
            "plain": (root / clip, None),
            "above": (root / "GT" / clip, root / "BIx4" / clip),  # Vid4 and REDS4 as in BasicSR
            "inside": (root / clip / "truth", root / clip / "BIx4"),  # UDM10 as in PFNL
        }[layout]
        write_sequence(folder, frames)
        if lr:
            write_sequence(lr, frames[:, ::4, ::4][:, :12, :16])
    made = load(root)
    assert [clip.name for clip in made] == ["city", "walk"]
    assert np.array_equal(made[0].truth, frames[:, :, :64])  # a multiple of 4
    assert made[0].lr.shape == (4, 12, 16, 3)
    if layout != "plain":
        given = load(root, lr_folder="BIx4")
        assert np.array_equal(given[1].lr, frames[:, ::4, ::4][:, :12, :16])
        assert not np.array_equal(made[1].lr, given[1].lr)


@pytest.mark.parametrize("degradation", ["bi", "bd", "real", "x264-28"])
def test_lr_frames_are_made_by_any_degradation(degradation: str, tmp_path: Path, frames: np.ndarray) -> None:
    write_sequence(tmp_path / "set" / "walk", frames[:, :, :60])
    (clip,) = load(tmp_path / "set", degradation=degradation)
    assert clip.lr.dtype == np.uint8
    assert clip.truth.shape[:3] == (4, 4 * clip.lr.shape[1], 4 * clip.lr.shape[2])
    assert abs(clip.lr.mean() - clip.truth.mean()) < 6


def test_a_video_is_reduced_before_it_is_truth(tmp_path: Path) -> None:
    gray = np.full((5, 64, 96, 3), 100, np.uint8)
    (tmp_path / "set").mkdir()
    write_video(tmp_path / "set" / "a.mp4", gray)
    (clip,) = load(tmp_path / "set")
    assert clip.truth.shape == (5, 32, 48, 3)
    assert clip.lr.shape == (5, 8, 12, 3)
    (stored,) = (tmp_path / "cache").iterdir()
    assert load(tmp_path / "set", frames=3)[0].truth.shape[0] == 3
    assert list((tmp_path / "cache").iterdir()) == [stored]


def test_frames_are_taken_from_the_middle(tmp_path: Path, frames: np.ndarray) -> None:
    write_sequence(tmp_path / "set" / "walk", frames)
    (clip,) = load(tmp_path / "set", frames=2)
    assert np.array_equal(clip.truth, frames[1:3, :, :64])


def test_faults_are_named(tmp_path: Path, frames: np.ndarray) -> None:
    root = tmp_path / "set"
    with pytest.raises(ExportError, match=r"expected a folder of clips at .*, found none"):
        find_sources(root)
    root.mkdir()
    with pytest.raises(ExportError, match="found none; a clip's images go into a folder of their own"):
        find_sources(root)
    write_sequence(root / "GT" / "walk", frames)
    write_sequence(root / "LR" / "walk", frames[:3, :12, :16])
    for folder, message in (
        ("gone", r"walk: expected its lr frames in .*gone/walk, found no folder; correct --lr-folder"),
        ("LR", r"walk: expected 4 lr frames of 16x12 in .*, found 3 of 16x12"),
    ):
        with pytest.raises(ExportError, match=message):
            load(root, lr_folder=folder)
    with pytest.raises(ExportError, match=r"expected run in .*, not found; correct the list"):
        find_sources(root, names=["run", "walk"])
    with pytest.raises(ExportError, match="walk: expected at least 200 pixels a side, found 66x48"):
        load(root, min_side=200)
