"""Footage of every kind a stranger has, the broken among it, and a device that holds it."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
from made_up_footage import write_sequence, write_video
from PIL import Image

from export.data.clips import SEGMENT, load_clip, load_folder, truth_factor
from export.data.sample import sample_clip
from export.errors import ExportError


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


def test_decoding(footage: Path, tmp_path: Path, moving: np.ndarray) -> None:
    clip = load_clip(footage / "a.mp4", tmp_path, min_side=64)
    assert clip.segments.shape[1:] == (SEGMENT, 160, 240, 3)
    truth = moving[:SEGMENT].reshape(SEGMENT, 160, 2, 240, 2, 3).mean((2, 4))  # area average
    assert (
        np.abs(clip.segments[0].astype(float) - truth).mean() < 2
    )  # 3.3 when chroma is shared by neighbours
    (stored,) = tmp_path.iterdir()
    again = load_clip(footage / "a.mp4", tmp_path, min_side=64)
    assert np.array_equal(clip.segments, again.segments)
    assert list(tmp_path.iterdir()) == [stored]


def test_no_segment_crosses_a_cut(tmp_path: Path, moving: np.ndarray) -> None:
    frames = np.concatenate([moving[:10] // 4, 255 - moving[:10] // 4])
    clip = load_clip(write_video(tmp_path / "cut.mp4", frames), tmp_path / "cache", min_side=64)
    means = clip.segments.mean((2, 3, 4))
    assert len(clip.segments) > 2
    assert np.ptp(means, axis=1).max() < 30
    assert np.ptp(means) > 100  # both shots are there


@pytest.mark.parametrize(("side", "factor"), [(180, 2), (480, 2), (720, 2), (1080, 2), (2160, 4), (4320, 8)])
def test_truth_factor(side: int, factor: int) -> None:
    assert truth_factor(side) == factor


def test_unusable_files_are_named_and_skipped(
    footage: Path, tmp_path: Path, moving: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "good.mp4").write_bytes((footage / "a.mp4").read_bytes())
    (tmp_path / "text.mp4").write_text("not a video")
    write_video(tmp_path / "short.mp4", moving[:1])
    write_video(tmp_path / "small.mp4", moving[:, :64, :64])
    with caplog.at_level("INFO", "export"):
        clips = load_folder(tmp_path, tmp_path / "cache", min_side=96)
    assert [clip.name for clip in clips] == ["good.mp4"]
    for message in (
        "text.mp4: not decodable",
        "short.mp4: expected at least 7 frames, found 1",
        "small.mp4: expected at least 96 pixels a side, found 32x32",
        "1 files used, 3 skipped",
    ):
        assert message in caplog.text


def test_folder_without_footage(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="found none among 0 files"):
        load_folder(tmp_path, tmp_path, min_side=64)
    with pytest.raises(ExportError, match="expected a folder of clips"):
        load_folder(tmp_path / "missing", tmp_path, min_side=64)
