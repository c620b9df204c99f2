"""Footage of every kind a stranger has, the broken among it, and a device that holds it."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from export.data.clips import SEGMENT, Clip, load_folder
from export.data.sample import sample_clip
from export.data.windows import WindowSampler
from export.errors import ExportError
from export.training.held import HeldFootage


def write_sequence(folder: Path, frames: np.ndarray, suffix: str = "png") -> Path:
    folder.mkdir()
    for index, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / f"frame{index}.{suffix}")
    return folder


@pytest.fixture
def frames() -> np.ndarray:
    """12 frames, 96x128: noise that brightens by 10 levels a frame."""
    noise = np.random.default_rng(0).integers(0, 100, (96, 128, 3), dtype=np.uint8)
    return np.stack([noise + 10 * t for t in range(12)]).astype(np.uint8)


def test_a_folder_of_images_is_a_clip_in_the_order_of_its_numbers(tmp_path: Path, frames: np.ndarray) -> None:
    write_sequence(tmp_path / "pan", frames)
    (tmp_path / "pan" / "notes.txt").write_text("not an image")
    (tmp_path / "empty").mkdir()
    clips = load_folder(tmp_path, tmp_path / "cache", min_side=64)
    assert [clip.name for clip in clips] == ["pan"]
    segments = clips[0].segments
    assert segments.shape == (6, SEGMENT, 96, 128, 3)  # not reduced: images are truth as they are
    assert np.array_equal(segments[0], frames[:SEGMENT])
    assert np.array_equal(segments[-1], frames[-SEGMENT:])  # frame10 and frame11 come last


def test_broken_sequences_and_videos_are_named_and_skipped(
    tmp_path: Path, frames: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    write_sequence(tmp_path / "good", frames, "jpg")
    (write_sequence(tmp_path / "torn", frames) / "frame5.png").write_bytes(b"\x89PNG\r\n")
    write_sequence(tmp_path / "one_frame", frames[:1])
    write_sequence(tmp_path / "small", frames[:, :48, :48])
    Image.fromarray(frames[0, :80]).save(write_sequence(tmp_path / "mixed", frames) / "frame3.png")
    whole = sample_clip().read_bytes()
    (tmp_path / "torn.mp4").write_bytes(whole[: len(whole) // 3])
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=48000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        silence.sample_rate = 48000
        container.mux([*stream.encode(silence), *stream.encode()])
    with caplog.at_level("INFO", "export"):
        clips = load_folder(tmp_path, tmp_path / "cache", min_side=64)
    assert [clip.name for clip in clips] == ["good"]
    for message in (
        "torn: frame5.png not decodable",
        "one_frame: expected at least 7 frames, found 1",
        "small: expected at least 64 pixels a side, found 48x48",
        "mixed: expected one frame size, found several",
        "torn.mp4: not decodable",
        "sound.mp4: expected a video stream, found none",
        "1 files used, 6 skipped",
    ):
        assert message in caplog.text


def test_loose_images_are_told_where_to_go(tmp_path: Path, frames: np.ndarray) -> None:
    folder = write_sequence(tmp_path / "pan", frames)
    with pytest.raises(ExportError, match="put the images of a sequence into a folder inside it"):
        load_folder(folder, tmp_path / "cache", min_side=64)


def noise_clip(name: str, frames: int, side: int) -> Clip:
    rng = np.random.default_rng(len(name))
    return Clip(name, rng.integers(0, 255, (3, frames, side, side + 16, 3), dtype=np.uint8))


def test_held_footage_gives_the_same_batches() -> None:
    """Mirrored, turned, reversed, at both strides, and photos under a camera: all by where to look."""
    clips, photos = [noise_clip("a", 7, 80), noise_clip("bb", 7, 96)], [noise_clip("p", 1, 160)]
    sampler = WindowSampler(clips, photos, patch=64, photo_share=0.3, seed=3)
    held = HeldFootage(sampler, torch.device("cpu"))
    for length in (3, 5):
        for step in range(12):
            located = held.locate(sampler.draw(step, 7, length), length)
            for a, b in zip(sampler.batch(step, 7, length), held.cut(located), strict=True):
                torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize(("share", "counts"), [(0, {0}), (0.3, {2, 3}), (1, {7})])
def test_what_is_drawn_has_few_shapes(share: float, counts: set[int]) -> None:
    """A GPU records a step for each."""
    sampler = WindowSampler(
        [noise_clip("a", 7, 80)], [noise_clip("p", 1, 160)], patch=64, photo_share=share, seed=3
    )
    held = HeldFootage(sampler, torch.device("cpu"))
    found = [held.locate(sampler.draw(step, 7), 3) for step in range(50)]
    assert {len(located.photos) for located in found} == counts
    assert np.mean([len(located.photos) for located in found]) == pytest.approx(7 * share, abs=0.3)
    assert held.cut(found[0]).hr_windows.shape == (7, 3, 3, 64, 64)


def test_of_a_few_crops_the_sharpest_is_taken() -> None:
    """More than half of the picture is flat; of four tries one nearly always finds the rest."""
    segments = noise_clip("half", 7, 128).segments.copy()
    segments[:, :, :, :72] = 90
    sampler = WindowSampler([Clip("half", segments)], [], patch=32, photo_share=0, seed=0)
    deviations = sampler.batch(0, 64).hr_windows[:, 1].std((1, 2, 3)) * 255
    assert (deviations > 6).float().mean() > 0.9  # about two thirds without


def test_footage_larger_than_a_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 2000))
    sampler = WindowSampler([noise_clip("a", 7, 80)], [], patch=64, photo_share=0, seed=0)
    with pytest.raises(ExportError, match=r"expected footage of at most 0\.0 GB to hold on cuda, found"):
        HeldFootage(sampler, torch.device("cuda"))
