"""Training: decoding as promised, batches that repeat, resumed runs equal to unbroken ones, right metrics."""

import csv
import json
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file
from skimage import color, metrics
from tiny_network import TINY

from export.__main__ import main
from export.checkpoint import load_checkpoint, save_checkpoint
from export.data.clips import SEGMENT, Clip, load_clip, load_folder, truth_factor
from export.data.degradations import bi
from export.data.sample import sample_clip
from export.data.windows import Batch, WindowSampler, windowed
from export.errors import ExportError
from export.metrics.collage import COLUMN_PX
from export.metrics.psnr_ssim import luma, psnr_y, ssim_y
from export.network import WIDTHS, MstGan, lucas_kanade
from export.network.flow_align import Estimate
from export.network.warp import backward_warp
from export.training.device import warn_of_slow_bf16
from export.training.evaluation import evaluate, mean
from export.training.losses import flow_loss, motion_loss, temporal_loss, true_flow
from export.training.trainer import Trainer, TrainOptions

pytestmark = pytest.mark.usefixtures("tiny_widths")


def write_video(path: Path, frames: np.ndarray) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "10"})
        stream.height, stream.width = frames.shape[1:3]
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def moving() -> np.ndarray:
    """20 frames, 320x480, of a smooth picture that moves by (2, 3) pixels per frame."""
    rng = np.random.default_rng(0)
    noise = torch.from_numpy(rng.random((1, 3, 16, 24), dtype=np.float32))
    picture = (F.interpolate(noise, scale_factor=24, mode="bicubic")[0].clamp(0, 1) * 255).byte().numpy()
    return np.stack([picture[:, 2 * t : 2 * t + 320, 3 * t : 3 * t + 480] for t in range(20)]).transpose(
        0, 2, 3, 1
    )


@pytest.fixture(scope="module")
def footage(tmp_path_factory: pytest.TempPathFactory, moving: np.ndarray) -> Path:
    folder = tmp_path_factory.mktemp("footage")
    for name in ("a.mp4", "b.mp4", "held_back.mp4"):
        write_video(folder / name, np.ascontiguousarray(moving))
    return folder


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
    with pytest.raises(ExportError, match="expected a folder of footage"):
        load_folder(tmp_path / "missing", tmp_path, min_side=64)


def test_batches_repeat_and_differ(footage: Path, tmp_path: Path) -> None:
    clips = load_folder(footage, tmp_path, min_side=64)
    photo = Clip("photo", np.random.default_rng(0).integers(0, 255, (1, 1, 160, 160, 3), dtype=np.uint8))

    def sampler(seed: int) -> WindowSampler:
        return WindowSampler(clips, [photo], patch=64, photo_share=0.5, seed=seed)

    batch = sampler(1).batch(7, 6)
    assert batch.hr_windows.shape == (6, 3, 3, 64, 64)
    assert batch.hr_windows.min() >= 0
    assert batch.hr_windows.max() <= 1
    assert batch.motion.shape == (6, 2, 2, 3)
    assert 0 < batch.motion.isnan().flatten(1).all(1).sum() < 6
    assert torch.equal(batch.hr_windows, sampler(1).batch(7, 6).hr_windows)
    assert not torch.equal(batch.hr_windows, sampler(1).batch(8, 6).hr_windows)
    assert not torch.equal(batch.hr_windows, sampler(2).batch(7, 6).hr_windows)


def test_known_motion_is_the_motion() -> None:
    noise = torch.rand(1, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    smooth = (F.interpolate(noise, scale_factor=16, mode="bicubic")[0].clamp(0, 1) * 255).byte()
    photo = Clip("photo", smooth.permute(1, 2, 0).numpy()[None, None])
    batch = WindowSampler([photo], [photo], patch=128, photo_share=1.0, seed=3).batch(0, 4)
    centre, inner = batch.hr_windows[:, 1], (..., slice(32, -32), slice(32, -32))
    for neighbour, motion in zip(batch.hr_windows[:, ::2].unbind(1), batch.motion.unbind(1), strict=True):
        flow = true_flow(motion, (128, 128), 1, (128, 128))
        before = (neighbour - centre)[inner].abs().mean()
        after = (backward_warp(neighbour, flow) - centre)[inner].abs().mean()
        assert after < 0.05 * before
        half = true_flow(motion, (128, 128), 2, (64, 64))
        torch.testing.assert_close(half, 0.5 * F.avg_pool2d(flow, 2), atol=1e-4, rtol=0)
    estimate = Estimate(centre, neighbour, flow)
    assert motion_loss(estimate, batch.motion[:, 1:], (128, 128)) == pytest.approx(1e-3, abs=1e-4)
    assert motion_loss(estimate, batch.motion[:, :1], (128, 128)) > 1
    assert motion_loss(estimate, batch.motion[:, :1] * torch.nan, (128, 128)) == 0


def test_long_crops_are_windows_in_a_row(footage: Path, tmp_path: Path) -> None:
    clips = load_folder(footage, tmp_path, min_side=64)
    photo = Clip("photo", np.random.default_rng(0).integers(0, 255, (1, 1, 192, 192, 3), dtype=np.uint8))
    sampler = WindowSampler(clips, [photo], patch=64, photo_share=0.5, seed=1)
    batch = sampler.batch(7, 6, length=5)
    assert batch.hr_windows.shape == (6, 5, 3, 64, 64)
    windows = windowed(*batch)
    assert windows.hr_windows.shape == (18, 3, 3, 64, 64)
    assert torch.equal(windows.hr_windows[4], batch.hr_windows[1, 1:4])
    known = ~windows.motion.isnan().flatten(1).any(1).view(6, 3)
    assert 0 < known.sum() < 18
    assert torch.equal(known.all(1), known.any(1))
    # A point that goes to the next frame and from there back to the one before is where it was.
    first, second = windows.motion.view(6, 3, 2, 2, 3)[known.all(1)][0, :2]
    last_row = torch.tensor([[0.0, 0.0, 1.0]])
    to_next, back = torch.cat((first[1], last_row)), torch.cat((second[0], last_row))
    torch.testing.assert_close(back @ to_next, torch.eye(3), atol=1e-5, rtol=0)


def test_downscale_equals_pillow() -> None:
    picture = np.random.default_rng(0).random((64, 96), dtype=np.float32)
    expected = Image.fromarray(picture, mode="F").resize((24, 16), Image.Resampling.BICUBIC)
    ours = bi(torch.from_numpy(picture).expand(1, 3, -1, -1))[0, 0].numpy()
    np.testing.assert_allclose(ours, np.clip(np.asarray(expected), 0, 1), atol=0.5 / 255 + 1e-5)


def test_flow_loss_prefers_the_true_motion() -> None:
    neighbour = F.avg_pool2d(torch.rand(1, 3, 32, 40), 3, 1, 1)

    def loss(flow: torch.Tensor, smoothness: float = 0.1) -> float:
        centre = neighbour.roll(-2, -1)  # centre(x) = neighbour(x + 2)
        return float(flow_loss(Estimate(centre, neighbour, flow), smoothness))

    still, moved = torch.zeros(1, 2, 32, 40), torch.zeros(1, 2, 32, 40)
    moved[:, 0] = 2
    assert loss(moved) < 0.5 * loss(still)
    assert loss(-moved) > loss(moved)
    torn = moved + torch.randn(1, 2, 32, 40)
    assert loss(torn, smoothness=1.0) > loss(torn, smoothness=0.0)
    assert loss(moved, smoothness=1.0) == pytest.approx(loss(moved, smoothness=0.0))


def test_temporal_loss_sees_flicker_and_not_motion() -> None:
    """Of a picture that moves by (8, 0) hr pixels: errors that move along cost nothing."""
    noise = torch.rand(1, 3, 16, 20, generator=torch.Generator().manual_seed(0))
    wide = F.interpolate(noise, scale_factor=8, mode="bicubic").clamp(0, 1)  # (1, 3, 128, 160)
    n, k, h, w = 1, 3, 128, 128

    def moving(picture: torch.Tensor) -> torch.Tensor:
        return torch.stack([picture[..., 8 * t : 8 * t + w] for t in range(k)], 1)

    flow = torch.zeros(2 * n * k, 2, h // 8, w // 8)  # to t-1, to t+1 for each of three windows
    flow[0::2, 0], flow[1::2, 0] = 1, -1  # of 8 hr pixels
    lr = torch.rand(n * k, 3, h // 4, w // 4)
    grey = lucas_kanade.luma(lr)
    aligned = torch.cat((lr, grey, grey), 1)
    error = torch.randn(wide.shape, generator=torch.Generator().manual_seed(1))
    still = error[:, None, :, :, :w].expand(n, k, -1, -1, -1)
    blinking = moving(error) * torch.tensor([1.0, -1.0, 1.0]).view(1, k, 1, 1, 1)
    along = moving(error)

    def loss(errors: torch.Tensor, aligned: torch.Tensor = aligned) -> float:
        return float(temporal_loss(errors, flow, aligned))

    # Borders repeat, and so what came into view at the edge is missed: 8 of 128 columns.
    assert loss(along) < 0.1 * loss(still)
    assert loss(blinking) > 1.2 * loss(still)
    torn = torch.cat((lr, grey, grey + 0.5), 1)
    assert loss(blinking, torn) == 0
    half = torn.clone()
    half[..., : w // 8] = aligned[..., : w // 8]
    left = blinking.clone()
    left[..., w // 2 + 8 :] *= 100
    assert loss(left, half) < 2 * loss(blinking)


def options(**changes: object) -> TrainOptions:
    small = {
        "widths": TINY.name, "steps": 6, "batch": 2, "patch": 64, "warmup": 2, "validate_every": 3,
        "bf16": False,
    }  # fmt: skip
    return TrainOptions(**{**small, **changes})


def test_resumed_run_equals_an_unbroken_one(
    footage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("export.training.trainer.LOG_EVERY", 3)
    clips = load_folder(footage, tmp_path / "cache", min_side=64)
    Trainer(options(), clips, [], clips[:1], tmp_path / "whole").run()

    stopped = Trainer(options(), clips, [], clips[:1], tmp_path / "parts")
    for step in range(4):
        stopped.train_step(stopped.sampler.batch(step, 2))
    stopped.save()
    Trainer(options(), clips, [], clips[:1], tmp_path / "parts").run()

    whole, parts = (load_file(tmp_path / name / "ema.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    rows = list(csv.DictReader((tmp_path / "whole" / "log.csv").open()))
    assert [row["step"] for row in rows] == ["3", "6"]
    assert float(rows[-1]["gain_db"]) == pytest.approx(0, abs=1)


def test_time_ends_a_run_and_a_resumed_one_has_what_was_left(
    footage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips = load_folder(footage, tmp_path / "cache", min_side=64)

    def trainer() -> Trainer:
        made = Trainer(options(steps=1000, minutes=0.1, warmup=0), clips, [], clips[:1], tmp_path / "run")
        monkeypatch.setattr("export.training.trainer.monotonic", lambda: float(made.step))  # a second a step
        return made

    first = trainer()
    first.spent_s = 2.0
    assert first.progress(0) == pytest.approx(1 / 3)
    first.save()
    second = trainer()
    assert second.learning_rate(0) == second.options.lr
    second.run()
    assert (second.step, second.spent_s) == (4, 6.0)
    assert second.learning_rate(4) == pytest.approx(second.options.final_lr)
    rows = list(csv.DictReader((tmp_path / "run" / "log.csv").open()))
    assert [row["step"] for row in rows] == ["4"]  # the last one counts, wherever time ends it
    assert rows[0]["gain_db"]
    done = trainer()
    done.run()
    assert done.step == 4


def test_compiled_network_computes_the_same(
    footage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced as on a GPU, run without a compiler."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: real(function, backend="aot_eager"))
    clips = load_folder(footage, tmp_path / "cache", min_side=64)
    plain, compiled = (
        Trainer(options(compile=c), clips, [], clips[:1], tmp_path / f"run{c}") for c in (False, True)
    )
    batch = plain.sampler.batch(0, 2)
    assert compiled.align is not compiled.network.flow_align.align
    for _ in range(2):
        expected, found = plain.train_step(batch), compiled.train_step(batch)
        assert found == pytest.approx(expected, rel=1e-4)


def test_training_lowers_the_loss(footage: Path, tmp_path: Path) -> None:
    clips = load_folder(footage, tmp_path / "cache", min_side=64)
    trainer = Trainer(options(steps=1000, lr=1e-3), clips, [], clips[:1], tmp_path / "run")
    batch = trainer.sampler.batch(0, 2)
    losses = [trainer.train_step(batch)["pixel"] for _ in range(40)]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(("capability", "is_slow"), [("AVX2", True), ("AVX512", False)])
def test_slow_bf16_is_warned_of(
    capability: str, is_slow: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    warn_of_slow_bf16(torch.device("cpu"))
    assert ("leave --bf16 out" in caplog.text) == is_slow


def test_run_of_other_widths_is_refused(
    footage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips = load_folder(footage, tmp_path / "cache", min_side=64)
    Trainer(options(), clips, [], clips[:1], tmp_path / "run").save()
    monkeypatch.setitem(WIDTHS, "other", TINY)
    with pytest.raises(ExportError, match=r"expected .* to hold a run of the 'other' widths, found 'tiny'"):
        Trainer(options(widths="other"), clips, [], clips[:1], tmp_path / "run")


def test_nan_loss_stops_and_keeps_the_last_state(footage: Path, tmp_path: Path) -> None:
    clips = load_folder(footage, tmp_path / "cache", min_side=64)
    trainer = Trainer(options(), clips, [], clips[:1], tmp_path / "run")
    trainer.save()
    before = (tmp_path / "run" / "state.pt").read_bytes()
    with pytest.raises(ExportError, match="expected a finite loss, found nan at step 0"):
        trainer.train_step(
            Batch(torch.full((2, 3, 3, 64, 64), torch.nan), torch.full((2, 2, 2, 3), torch.nan))
        )
    assert (tmp_path / "run" / "state.pt").read_bytes() == before


def test_train_command(footage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("export.training.trainer.LOG_EVERY", 2)
    held_back = tmp_path / "validation.txt"
    held_back.write_text("held_back.mp4\n")
    arguments = [
        "train", "--drawings", 1, "--clips", footage, "--validation", held_back, "--out", tmp_path / "run",
        "--cache", tmp_path / "cache",
        "--widths", TINY.name, "--steps", 2, "--batch", 1, "--patch", 64, "--fp32",
    ]  # fmt: skip
    result = CliRunner().invoke(main, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert load_checkpoint(tmp_path / "run" / "ema.safetensors").widths == TINY
    held_back.write_text("gone.mp4\n")
    result = CliRunner().invoke(main, list(map(str, arguments)))
    assert result.exit_code == 1
    assert "expected gone.mp4 in" in result.output


def test_untrained_network_scores_as_bicubic(footage: Path, tmp_path: Path) -> None:
    clips = load_folder(footage, tmp_path, min_side=64)
    scores = evaluate(MstGan(TINY).eval(), clips[:2], segments=1)
    assert scores[0].frames == SEGMENT - 2
    assert mean(scores).gain_db == 0
    assert mean(scores).network == mean(scores).bicubic
    assert mean(scores).psnr_y_db > 20


def test_evaluate_command(footage: Path, tmp_path: Path) -> None:
    save_checkpoint(MstGan(TINY), tmp_path / "tiny.safetensors", {})
    (tmp_path / "clips.txt").write_text("a.mp4\n")
    arguments = [
        "evaluate", "--clips", footage, "--validation", tmp_path / "clips.txt", "--cache", tmp_path / "cache",
        "--checkpoint", tmp_path / "tiny.safetensors", "--segments", 1, "--out", tmp_path / "out",
    ]  # fmt: skip
    result = CliRunner().invoke(main, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "out" / "scores.json").read_text())["scores"]["tiny"]
    assert [row["clip"] for row in rows] == ["a.mp4", "mean"]
    assert rows[0]["network"] == rows[0]["bicubic"]  # untrained
    assert "| a.mp4 | 5 |" in result.output
    assert Image.open(tmp_path / "out" / "a.png").size[0] == 3 * COLUMN_PX


def test_metrics_agree_with_scikit_image() -> None:
    with av.open(str(sample_clip())) as container:
        frame = next(container.decode(video=0)).to_ndarray(format="rgb24")
    noise = np.random.default_rng(0).normal(0, 8, frame.shape)
    noisy = np.clip(frame + noise, 0, 255).round().astype(np.uint8)
    np.testing.assert_allclose(luma(frame), color.rgb2ycbcr(frame)[..., 0], atol=1e-2)
    inner = (slice(4, -4), slice(4, -4))
    ys = [color.rgb2ycbcr(image)[..., 0][inner] for image in (noisy, frame)]
    assert psnr_y(noisy, frame) == pytest.approx(
        metrics.peak_signal_noise_ratio(*ys, data_range=255), abs=1e-3
    )
    assert psnr_y(frame, frame) == float("inf")
    assert ssim_y(frame, frame) == 1
    assert 0.3 < ssim_y(noisy, frame) < 0.99
