"""Sequences to train on, and the training of a recurrent network."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner

from export.__main__ import main
from export.checkpoint import load_stream_checkpoint
from export.data import sequences
from export.data.degradations import bi, degrade
from export.data.evaluation_clips import EvaluationClip
from export.data.sequences import HR_CROP, Scene, SequenceSampler, load_scenes, share_scenes
from export.errors import ExportError
from export.network import WIDTHS, Widths
from export.network.stream import STREAM_WIDTHS, StreamWidths
from export.training import sequence_trainer
from export.training.sequence_trainer import SequenceOptions, SequenceTrainer
from export.training.stream_evaluation import by_age, psnr_by_frame

CHECKPOINTS = Path(__file__).parents[2] / "export" / "checkpoints"
TINY = StreamWidths(name="tiny_stream", body=16, inner=(8,), features=8)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STREAM_WIDTHS, TINY.name, TINY)
    monkeypatch.setattr(sequence_trainer, "LENGTHS", (3,))
    monkeypatch.setattr(sequence_trainer, "BURN_IN", (0, 1))


def scene(frames: int = 14, height: int = 170, width: int = 270, seed: int = 0) -> Scene:
    """Frame t's green is t, so that a sequence tells where it was cut."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (frames, height, width, 3), dtype=np.uint8)
    pixels[..., 1] = 10 * np.arange(frames)[:, None, None]
    return with_lr(f"clip{seed}.mp4", pixels)


def with_lr(clip: str, pixels: np.ndarray) -> Scene:
    height, width = (side // 4 * 4 for side in pixels.shape[1:3])
    return Scene(clip, pixels, 1.0, (degrade("bi", pixels[:, :height, :width]),))


def test_a_batch_is_a_function_of_seed_and_step() -> None:
    one, two = (SequenceSampler([scene()], seed=3) for _ in range(2))
    two.batch(0, 1, 4)
    a, b = one.batch(7, 2, 4), two.batch(7, 2, 4)
    assert torch.equal(a.hr, b.hr)
    assert torch.equal(a.starts, b.starts)
    assert not torch.equal(a.hr, one.batch(8, 2, 4).hr)


def test_sequences_have_one_crop_size_and_start_with_a_start() -> None:
    sampler = SequenceSampler([scene(), scene(20, 300, 200, 1)], seed=0)
    sizes, starts = set(), []
    for step in range(20):
        batch = sampler.batch(step, 2, 9)
        sizes.add(tuple(batch.hr.shape[-2:]))
        starts.append(batch.starts)
        assert batch.hr.shape[:3] == (2, 9, 3)
        assert batch.hr.min() >= 0 and batch.hr.max() <= 1
    assert sizes == {HR_CROP, HR_CROP[::-1]}
    all_starts = torch.cat(starts)
    assert (all_starts[:, 0] == 1).all()
    assert 0 < all_starts[:, 1:].sum() < 0.3 * len(all_starts)  # some resets within


def test_frames_of_a_video_are_consecutive(monkeypatch: pytest.MonkeyPatch) -> None:
    for share in ("CUT_SHARE", "FLASH_SHARE", "FREEZE_SHARE", "SKIP_SHARE"):
        monkeypatch.setattr(sequences, share, 0.0)
    sampler = SequenceSampler([scene()], seed=0)
    for step in range(5):
        levels = sampler.batch(step, 1, 9).hr[0, :, 1].mean(dim=(1, 2)) * 25.5
        assert torch.allclose(levels.diff().abs(), torch.ones(8), atol=1e-3)


def test_a_group_of_clips_has_its_share(tmp_path: Path) -> None:
    for name, frames in (("bbb1.mp4", 100), ("bbb2.mp4", 100), ("sea.mp4", 100)):
        np.save(tmp_path / f"{name}.0.npy", np.zeros((frames, 1, 1, 3), np.uint8))
        (tmp_path / "lr").mkdir(exist_ok=True)
        np.save(tmp_path / "lr" / f"{name}.0.bi.npy", np.zeros((frames, 1, 1, 3), np.uint8))
    scenes = load_scenes(tmp_path, tmp_path / "lr", {"bbb": 0.25})
    shares = {s.clip: s.weight / sum(s.weight for s in scenes) for s in scenes}
    assert shares["bbb1.mp4"] + shares["bbb2.mp4"] == pytest.approx(0.25)


def test_lr_frames_are_of_the_same_crop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequences, "FLASH_SHARE", 0.0)
    sampler = SequenceSampler([squares()], seed=0)
    for step in range(8):
        hr, lr, _ = sampler.batch(step, 1, 4)
        inner = (..., slice(4, -4), slice(4, -4))  # beside the edges of a crop, `bi` sees less
        torch.testing.assert_close(lr[inner], bi(hr)[inner], atol=1.5 / 255, rtol=0)


def test_degraded_frames_are_drawn_and_clean_ones_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    clean = squares()
    both = replace(clean, lr=(clean.lr[0], 255 - clean.lr[0]))
    sampler = SequenceSampler([both], seed=0)
    monkeypatch.setattr(sequences, "CLEAN_SHARE", 0.3)
    inverted = 0
    for step in range(60):
        hr, lr, _ = sampler.batch(step, 1, 2)
        inverted += bool((lr - bi(hr)).abs().mean() > 0.1)
    assert 30 < inverted < 54


def test_still_images_have_their_share() -> None:
    footage, rendered = [scene(seed=k) for k in range(3)], [scene(seed=9)]
    weights = [s.weight for s in share_scenes(footage, rendered)]
    assert weights[-1] / sum(weights) == pytest.approx(sequences.STILL_IMAGE_SHARE)


def squares(frames: int = 14) -> Scene:
    """Plain squares of 8 pixels that move by a pixel per frame: edges can be learned, noise cannot."""
    squares_ = np.random.default_rng(0).integers(0, 256, (22, 36, 3), dtype=np.uint8)
    picture = squares_.repeat(8, axis=0).repeat(8, axis=1)
    return with_lr("squares.mp4", np.stack([picture[:170, t : t + 270] for t in range(frames)]))


def trainer(out: Path, **options: object) -> SequenceTrainer:
    sampler = SequenceSampler([squares()], seed=0)
    return SequenceTrainer(SequenceOptions(widths="tiny_stream", batch=1, **options), sampler, out, None)


def steps(run: SequenceTrainer, count: int) -> list[float]:
    return [run.learn(*run.draw(run.step)) for _ in range(count)]


def test_loss_falls(tmp_path: Path) -> None:
    run = trainer(tmp_path, lr=2e-2, warmup=1)
    batch, burn = run.draw(0)
    losses = [run.learn(batch, burn) for _ in range(20)]
    assert losses[-1] < 0.95 * losses[0]
    assert run.lr_pixels == 20 * 3 * 40 * 64


def test_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole")
    expected = steps(whole, 6)
    first = trainer(tmp_path / "parts")
    found = steps(first, 3)
    first.save()
    second = trainer(tmp_path / "parts")
    found += steps(second, 3)
    assert found == expected
    assert (second.step, second.lr_pixels) == (whole.step, whole.lr_pixels)
    for mine, theirs in ((whole.network, second.network), (whole.ema, second.ema)):
        assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), theirs.parameters(), strict=True))


def test_gradients_reach_an_earlier_frame_through_the_state(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in run.network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    network = run.network.stream_generator
    _, frames, starts = run.sampler.batch(0, 1, 2)
    aligned = [run.network.stream_align.align(frames[:, t], frames[:, 0]) for t in (0, 1)]
    image = aligned[0].image.requires_grad_()
    _, state = network.step(aligned[0]._replace(image=image), network.start(1, frames), starts[:, :1])
    answer, _ = network.step(aligned[1], state, torch.zeros(1, 1))
    answer.sum().backward()
    assert image.grad is not None and image.grad.abs().sum() > 0


def test_the_control_is_a_window_network_on_the_same_frames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(WIDTHS, "tiny_window", Widths(name="tiny_window", body=16, body_inner=(8,)))
    sampler = SequenceSampler([squares()], seed=0)
    run = SequenceTrainer(SequenceOptions(widths="tiny_window", batch=1), sampler, tmp_path)
    batch, _ = run.draw(0)
    loss = run.loss(batch, burn_in=1)
    frames, truth = batch.lr[0], F.pixel_unshuffle(batch.hr[0], 4)
    alone = []
    with torch.no_grad():
        for t in range(1, len(frames)):
            starts, ends = batch.starts[0, t] > 0, t + 1 == len(frames) or batch.starts[0, t + 1] > 0
            window = [frames[t if starts else t - 1], frames[t], frames[t if ends else t + 1]]
            windows = torch.stack(window)[None]
            flow, aligned, _ = run.network.flow_align.align(windows)
            alone.append(run.network.generator.generate(windows, flow, aligned))
        expected = sequence_trainer.PIXEL_LOSSES["charbonnier_luma"](torch.cat(alone), truth[1:])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    run.learn(batch, 1)


def test_weights_come_back_and_are_scored_by_age(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.save()
    network = load_stream_checkpoint(tmp_path / "ema.safetensors")
    truth = squares(7).frames[:, :160, :256]
    scene = EvaluationClip("squares", truth, degrade("bi", truth))
    gain = psnr_by_frame(network, scene) - psnr_by_frame(None, scene)
    assert np.abs(gain).max() < 0.05  # untrained: bicubic
    assert by_age(np.arange(7.0)) == {"0": 0, "1": 1, "2": 2, "3-4": 3.5, "5-9": 5.5, "all": 3}
    with pytest.raises(ExportError, match="expected a checkpoint"):
        load_stream_checkpoint(tmp_path / "none.safetensors")


def test_the_committed_unfinished_run_resumes(tmp_path: Path) -> None:
    shutil.copy(CHECKPOINTS / "unfinished" / "stream_state.pt", tmp_path / "state.pt")
    run = SequenceTrainer(SequenceOptions(), SequenceSampler([squares()], seed=0), tmp_path)
    served = load_stream_checkpoint(CHECKPOINTS / "unfinished" / "stream.safetensors")
    assert run.step > 0
    for mine, theirs in zip(run.ema.parameters(), served.parameters(), strict=True):
        assert torch.equal(mine.half().float(), theirs)


def test_the_learning_rate_rises_stays_and_falls(tmp_path: Path) -> None:
    run = trainer(tmp_path, lr=1.0, warmup=4, until=100, decay_share=0.5)
    rates = []
    for run.step, run.lr_pixels in ((0, 0), (3, 10), (9, 50), (12, 75), (15, 100)):
        rates.append(run._rate())
    assert rates == pytest.approx([0.25, 1, 1, 0.5, 0])


def test_a_recipe_sets_defaults_and_the_command_line_overrides_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    monkeypatch.setattr(
        "export.training.sequence_trainer.SequenceTrainer", lambda options, *_: found.append(options)
    )
    for module, name in (
        ("degraded", "render_photos"), ("degraded", "degrade_scenes"), ("line_art", "draw_all"),
        ("sequences", "build_cache"), ("sequences", "load_scenes"), ("sequences", "load_photos"),
        ("sequences", "share_scenes"), ("sequences", "SequenceSampler"),
    ):  # fmt: skip
        monkeypatch.setattr(f"export.data.{module}.{name}", lambda *_, **__: [])
    (tmp_path / "names.txt").touch()
    files = [
        "--clips",
        tmp_path,
        "--photos",
        tmp_path,
        "--validation",
        tmp_path / "names.txt",
        "--out",
        "run",
    ]
    command = ["train-sequences", "--recipe", "real", *map(str, files), "--lr", "1e-3"]
    CliRunner().invoke(main, command)
    (options,) = found
    assert (options.widths, options.lr, options.until) == ("student", 1e-3, 150_000_000)
    (tmp_path / "wrong.toml").write_text("[sequences]\nwidht = 3\n")
    result = CliRunner().invoke(main, [*command, "--recipe", str(tmp_path / "wrong.toml")])
    assert result.exit_code == 1
    assert "expected settings of train-sequences in" in result.output and "found widht" in result.output
    result = CliRunner().invoke(main, [*command, "--recipe", "student"])
    assert "expected a table [sequences] in the recipe student" in result.output
