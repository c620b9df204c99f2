"""The adversarial stage: a discriminator that learns and resumes, a perceptual loss, the rule of the best."""

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner, Result
from made_up_footage import moving_clip
from tiny_network import TINY, shake

from export.__main__ import main
from export.checkpoint import load_checkpoint, save_checkpoint
from export.data.clips import Clip
from export.errors import ExportError
from export.metrics.lpips import BACKBONE_FILE, HEADS_FILE, Lpips
from export.network import MstGan
from export.training.best_checkpoint import BestCheckpoint, validation_crops
from export.training.config import Config
from export.training.evaluate import MetricConfig, Metrics, Score
from export.training.gan import NOISE, AdversarialLoss, Discriminator
from export.training.perceptual import DistilledVgg, load_distilled_vgg
from export.training.trainer import BEST_FILE, Trainer

STEPS = 4
CPU = torch.device("cpu")


pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("tiny_widths")]


@pytest.fixture(scope="module")
def clip() -> Clip:
    return moving_clip((20, 24), 6)


@pytest.fixture
def start() -> MstGan:
    return shake(MstGan(TINY))


@pytest.fixture(scope="module")
def vgg() -> DistilledVgg:
    torch.manual_seed(3)
    return DistilledVgg().eval().requires_grad_(False)


@pytest.fixture
def metrics() -> MetricConfig:
    torch.manual_seed(4)
    lpips = Lpips().eval().requires_grad_(False)
    for head in lpips.heads:
        head.fill_(1.0)
    return MetricConfig(lpips, tof=True)


def config(**changes: object) -> Config:
    small = {
        "objective": "adversarial", "widths": TINY.name, "steps": STEPS, "batch": 1, "patch": 64,
        "warmup": 1, "validate_every": 2, "bf16": False, "lr": 1e-4, "temporal_weight": 0.5,
    }  # fmt: skip
    return Config(**{**small, **changes})


def random_triplets(seed: int) -> torch.Tensor:
    return torch.rand(2, 3, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def test_discriminator_is_bounded_and_sees_time() -> None:
    torch.manual_seed(0)
    discriminator = Discriminator()
    frames, bicubic = random_triplets(0), torch.rand(2, 3, 32, 32)
    for _ in range(20):
        scores = discriminator(frames, bicubic)
    assert scores.shape == (2, 1, 2, 2)
    discriminator.eval()
    for layer in discriminator.layers:
        norm = torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2)
        assert float(norm) == pytest.approx(1, rel=0.2)
    assert not torch.allclose(discriminator(frames, bicubic), discriminator(frames[:, [2, 1, 0]], bicubic))
    assert not torch.allclose(discriminator(frames, bicubic), discriminator(frames, 1 - bicubic))


def test_discriminator_learns_to_tell_and_the_generator_is_told() -> None:
    torch.manual_seed(0)
    adversarial = AdversarialLoss(config(adversarial_weight=2.0), None, CPU)
    truth, lr = random_triplets(0), torch.rand(2, 3, 8, 8)
    answers = F.avg_pool2d(truth.flatten(0, 1), 5, 1, 2).view_as(truth).requires_grad_()
    losses = []
    for step in range(30):
        total, parts = adversarial.generator_loss(answers, truth, lr, step, 0.5)
        assert total.item() == pytest.approx(2 * float(parts["adversarial"]))
        losses.append(float(adversarial.discriminator_step(1e-3)))
    assert losses[-1] < 0.5 * losses[0]
    total, _ = adversarial.generator_loss(answers, truth, lr, 30, 1.0)
    total.backward()
    assert answers.grad is not None
    # What the generator is told leaves the discriminator alone, and takes it nearer to the truth.
    with torch.no_grad():
        better, _ = adversarial.generator_loss(answers - 10 * answers.grad, truth, lr, 30, 1.0)
    assert better < total


def test_spectral_norms_are_estimated_in_fp32() -> None:
    frames, bicubic = torch.rand(1, 3, 3, 32, 32), torch.rand(1, 3, 32, 32)
    plain = Discriminator()
    mixed = Discriminator()
    mixed.load_state_dict(plain.state_dict())
    expected = plain(frames, bicubic)
    with torch.autocast("cpu", torch.bfloat16):
        found = mixed(frames, bicubic)
    assert found.dtype == torch.float32
    assert not torch.equal(found, expected)  # the convolutions were not in FP32
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.01)
    states = plain.state_dict(), mixed.state_dict()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_noise_fades_out(monkeypatch: pytest.MonkeyPatch) -> None:
    adversarial = AdversarialLoss(config(), None, CPU)
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(
        adversarial.discriminator, "forward", lambda x, _: seen.append(x) or x.mean((1, 2), keepdim=True)
    )
    frames, lr = random_triplets(0), torch.rand(2, 3, 8, 8)
    for progress in (0.0, 0.5, 1.0, 1.2):
        adversarial.generator_loss(frames, frames, lr, 0, progress)
    sigmas = [float((x - frames).std()) for x in seen]
    assert sigmas == pytest.approx([NOISE, NOISE / 2, 0, 0], rel=0.05)
    adversarial.generator_loss(frames, frames, lr, 1, 0.0)
    assert not torch.equal(seen[-1], seen[0])
    adversarial.generator_loss(frames, frames, lr, 0, 0.0)
    assert torch.equal(seen[-1], seen[0])


def test_perceptual_distance(vgg: DistilledVgg) -> None:
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    little, much = (F.avg_pool2d(image, size, 1, size // 2) for size in (3, 7))
    assert vgg(image, image) == 0
    assert 0 < vgg(little, image) < vgg(much, image) < 1
    moved = little.clone().requires_grad_()
    vgg(moved, image).backward()
    assert moved.grad is not None
    assert vgg(moved.detach() - 10 * moved.grad, image) < vgg(little, image)
    assert not any(p.requires_grad for p in vgg.parameters())


def published(vgg: DistilledVgg) -> dict[str, object]:
    state = {name.removeprefix("convs."): value for name, value in vgg.state_dict().items()}
    return {"epoch": 5, "model": {**state, "conv51_aux.weight": torch.zeros(512, 128, 1, 1)}}


def test_published_weights_are_read(vgg: DistilledVgg, tmp_path: Path) -> None:
    torch.save(published(vgg), tmp_path / "vgg.pth")
    image, other = torch.rand(2, 1, 3, 32, 32)
    assert load_distilled_vgg(tmp_path / "vgg.pth")(image, other) == vgg(image, other)


@pytest.mark.parametrize("fault", ["missing", "text", "list", "shape", "key"])
def test_other_perceptual_files_are_refused(fault: str, vgg: DistilledVgg, tmp_path: Path) -> None:
    path, stored = tmp_path / "vgg.pth", published(vgg)
    model = stored["model"]
    assert isinstance(model, dict)
    if fault == "shape":
        model["conv31.weight"] = torch.zeros(256, 128, 3, 3)
    if fault == "key":
        del model["conv44.bias"]
    if fault == "text":
        path.write_text("weights")
    elif fault != "missing":
        torch.save([1, 2] if fault == "list" else stored, path)
    with pytest.raises(ExportError, match="expected weights of VGG19 distilled to a sixteenth") as caught:
        load_distilled_vgg(path)
    assert "\n" not in str(caught.value)


def test_the_best_is_the_lowest_lpips_among_the_allowed() -> None:
    first = Metrics(psnr_db=30.0, ssim=0.9, lpips=0.30, tof_px=0.20)
    best = BestCheckpoint()
    assert best.is_best(first, 0)
    assert best.is_best(replace(first, psnr_db=29.0, lpips=0.25, tof_px=0.21), 1)
    assert not best.is_best(replace(first, psnr_db=28.9, lpips=0.10), 2)  # loses more than 1 dB
    assert not best.is_best(replace(first, lpips=0.10, tof_px=0.2101), 3)  # flickers
    resumed = BestCheckpoint()
    resumed.load_state_dict(best.state_dict())
    assert resumed.step == 1
    assert not resumed.is_best(replace(first, lpips=0.26), 4)
    assert resumed.is_best(replace(first, lpips=0.24, psnr_db=29.5), 5)
    assert resumed.step == 5
    with pytest.raises(ExportError, match="expected LPIPS and tOF"):
        resumed.is_best(replace(first, tof_px=None), 6)


def test_validation_is_on_the_centers() -> None:
    frames = np.arange(400 * 300).reshape(1, 1, 400, 300, 1)
    (center,) = validation_crops([Clip("large", frames)])
    assert center.segments.shape == (1, 1, 256, 256, 1)
    assert center.segments[0, 0, 0, 0] == frames[0, 0, 72, 22]
    (small,) = validation_crops([Clip("small", frames[:, :, :96, :112])])
    assert small.segments.shape == (1, 1, 96, 112, 1)


@pytest.mark.slow
def test_resumed_adversarial_run_equals_an_unbroken_one(
    clip: Clip, start: MstGan, vgg: DistilledVgg, metrics: MetricConfig, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("export.training.trainer.LOG_EVERY", 2)

    def trainer(name: str) -> Trainer:
        out = tmp_path / name
        return Trainer(config(), [clip], [], [clip], out, start, perceptual=vgg, metrics=metrics)

    trainer("whole").run()
    stopped = trainer("parts")
    for step in range(3):
        stopped.train_step(stopped.sampler.batch(step, 1, length=5))
    stopped.save()
    trainer("parts").run()
    whole, parts = (
        torch.load(tmp_path / name / "state.pt", weights_only=True) for name in ("whole", "parts")
    )
    for kind in (("ema",), ("network",), ("adversarial", "discriminator")):
        a, b = whole, parts
        for key in kind:
            a, b = a[key], b[key]
        assert all(torch.equal(value, b[name]) for name, value in a.items()), kind
    rows = list(csv.DictReader((tmp_path / "whole" / "log.csv").open()))
    assert [row["step"] for row in rows] == ["0", "2", "4"]
    for row in rows:
        assert float(row["lpips"]) > 0 and float(row["tof_px"]) >= 0
    for column in ("pixel", "temporal", "perceptual", "adversarial", "discriminator"):
        assert np.isfinite(float(rows[-1][column])), column
    assert load_checkpoint(tmp_path / "whole" / BEST_FILE).widths == TINY


def test_bf16_changes_the_losses_little(
    clip: Clip, start: MstGan, vgg: DistilledVgg, metrics: MetricConfig, tmp_path: Path
) -> None:
    def parts(*, bf16: bool) -> dict[str, float]:
        torch.manual_seed(0)
        trainer = Trainer(
            config(bf16=bf16), [clip], [], [clip], tmp_path / str(bf16), start, perceptual=vgg,
            metrics=metrics,
        )  # fmt: skip
        return trainer.train_step(trainer.sampler.batch(0, 1, length=5))

    exact, coarse = parts(bf16=False), parts(bf16=True)
    assert coarse != exact
    assert coarse == pytest.approx(exact, rel=0.05, abs=0.01)


@pytest.mark.parametrize("best", [0, 1])
def test_best_checkpoint_is_not_the_last(
    best: int, clip: Clip, start: MstGan, metrics: MetricConfig, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr("export.training.trainer.LOG_EVERY", 1)
    lpips = iter([0.30, 0.20, 0.25, 0.24, 0.22] if best else [0.19, 0.20, 0.25, 0.24, 0.22])

    def score(trainer: Trainer) -> Score:
        found = Metrics(psnr_db=30.0, ssim=0.9, lpips=next(lpips), tof_px=0.2)
        return Score("mean", 5, found, found)

    kept: dict[int, bytes] = {}
    real_save = Trainer.save

    def save(trainer: Trainer) -> None:
        real_save(trainer)
        kept[trainer.step] = (trainer.out / "ema.safetensors").read_bytes()

    monkeypatch.setattr(Trainer, "score", score)
    monkeypatch.setattr(Trainer, "save", save)
    o = config(validate_every=1, ema=0.0, perceptual_weight=0.0)
    Trainer(o, [clip], [], [clip], tmp_path, start, metrics=metrics).run()
    found = load_checkpoint(tmp_path / BEST_FILE).state_dict()
    save_checkpoint(start, tmp_path / "0.safetensors", {})
    for step, data in kept.items():
        (tmp_path / f"{step}.safetensors").write_bytes(data)
    wanted, last = (load_checkpoint(tmp_path / f"{step}.safetensors").state_dict() for step in (best, STEPS))
    assert all(torch.equal(found[name], wanted[name]) for name in found)
    assert any(not torch.equal(found[name], last[name]) for name in found)
    assert ("holds the weights that the run began with" in caplog.text) == (best == 0)


def test_run_of_another_objective_is_refused(clip: Clip, start: MstGan, tmp_path: Path) -> None:
    Trainer(config(objective="fidelity"), [clip], [], [clip], tmp_path, start).save()
    with pytest.raises(ExportError, match="to hold an adversarial run, found one of another objective"):
        Trainer(config(), [clip], [], [clip], tmp_path, start)


def train(folder: Path, *more: object) -> Result:
    (folder / "held_back.txt").write_text("a.mp4\n")
    arguments = [
        "train", "--clips", folder, "--validation", folder / "held_back.txt", "--out", folder / "run",
        "--line-art", 1, "--widths", TINY.name, "--patch", 64, *more,
    ]  # fmt: skip
    return CliRunner().invoke(main, list(map(str, arguments)))


def test_command_says_what_an_adversarial_run_needs(
    start: MstGan, metrics: MetricConfig, tmp_path: Path
) -> None:
    assert metrics.lpips is not None
    save_checkpoint(start, tmp_path / "start.safetensors", {})
    torch.save(metrics.lpips.backbone.state_dict(), tmp_path / BACKBONE_FILE)
    heads = {f"lin{i}.model.1.weight": head for i, head in enumerate(metrics.lpips.heads)}
    torch.save(heads, tmp_path / HEADS_FILE)
    adversarial = ("--objective", "adversarial")
    init = ("--init", tmp_path / "start.safetensors")
    weights = ("--weights", tmp_path)
    for arguments, message in (
        (adversarial, "expected --init with --objective adversarial"),
        ((*adversarial, *init), "expected --weights FOLDER"),
        ((*adversarial, *init, *weights), "expected --perceptual FILE"),
        ((*adversarial, *init, *weights, "--perceptual", tmp_path / "x.pth"), "found no file"),
        (weights, "--perceptual and --weights with --objective adversarial alone, found 'fidelity'"),
        ((*adversarial, *init, *weights, "--perceptual-weight", 0), "expected a.mp4 in"),  # the next fault
    ):
        result = train(tmp_path, *arguments)
        assert result.exit_code == 1
        assert message in result.output, result.output
        assert result.output.strip().count("\n") <= 1
