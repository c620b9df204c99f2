"""The recipe of all checkpoints at toy scale: every stage in order, stopped and resumed."""

import json
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner, Result
from PIL import Image
from safetensors import safe_open
from tiny_network import LIGHT, TINY

from export.__main__ import main
from export.checkpoint import FOLDER as CHECKPOINTS
from export.checkpoint import load_checkpoint
from export.data.clips import SEGMENT
from export.metrics.lpips import BACKBONE_FILE, HEADS_FILE, Lpips
from export.network import WIDTHS
from export.training.config import read_recipe
from export.training.perceptual import DistilledVgg
from export.training.train_all import RESERVE, read_stages
from export.training.trainer import Trainer

pytestmark = pytest.mark.slow

WIDE = replace(TINY, name="baseline", body_inner=(16,), context_inner=16)
STEPS = 2
STAGES = read_stages(read_recipe("all"), {}, "all")


@pytest.fixture(autouse=True)
def tiny_widths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VSR_DEBUG", raising=False)
    for name, widths in (
        ("baseline_trunk", replace(LIGHT, body_inner=(16,))),
        ("pruned", TINY),
        ("compact", LIGHT),
        ("student", replace(LIGHT, body_inner=(8, 8))),
    ):
        monkeypatch.setitem(WIDTHS, name, replace(widths, name=name))
    monkeypatch.setitem(WIDTHS, WIDE.name, WIDE)


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """Clips of two moving pictures, one to validate on, and random weights in the published layouts."""
    torch.manual_seed(0)
    for name in ("learned", "held_back"):
        picture = F.interpolate(torch.rand(1, 3, 8, 10), scale_factor=16, mode="bicubic")[0].clamp(0, 1)
        (tmp_path / "clips" / name).mkdir(parents=True)
        for t in range(SEGMENT):
            frame = (picture[:, 2 * t : 2 * t + 96, 3 * t : 3 * t + 112] * 255).byte().permute(1, 2, 0)
            Image.fromarray(np.asarray(frame)).save(tmp_path / "clips" / name / f"{t}.png")
    (tmp_path / "held_back.txt").write_text("held_back\n")
    lpips = Lpips()
    torch.save(lpips.backbone.state_dict(), tmp_path / BACKBONE_FILE)
    torch.save({f"lin{i}.model.1.weight": h + 1 for i, h in enumerate(lpips.heads)}, tmp_path / HEADS_FILE)
    vgg = {name.removeprefix("convs."): value for name, value in DistilledVgg().state_dict().items()}
    torch.save({"model": vgg}, tmp_path / "vgg.pth")
    return tmp_path


def train_all(folder: Path, *more: object) -> Result:
    arguments = [
        "train-all", "--line-art", 1, "--clips", folder / "clips", "--validation", folder / "held_back.txt",
        "--cache", folder / "cache", "--out", folder / "out", "--perceptual", folder / "vgg.pth",
        "--weights", folder, "--minutes", 600, "--steps", STEPS, "--batch", 3, "--patch", 64, *more,
    ]  # fmt: skip
    return CliRunner().invoke(main, list(map(str, arguments)))


def test_stages_share_the_time_in_a_possible_order() -> None:
    assert sum(stage.share for stage in STAGES) == pytest.approx(1 - RESERVE)
    delivered = {stage.deliver for stage in STAGES} - {None}
    assert delivered == {path.stem for path in CHECKPOINTS.glob("*.safetensors")}
    for stage in STAGES:
        assert stage.config.widths in WIDTHS


def test_a_recipe_is_stopped_and_resumed(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_at: list[tuple[str, int]] = [("pruned", 0)]
    steps: Counter[str] = Counter()
    real = Trainer.train_step

    def train_step(trainer: Trainer, hr_windows: torch.Tensor) -> dict[str, float]:
        if (trainer.out.name, trainer.step) in stop_at:
            signal.raise_signal(signal.SIGINT)
        steps[trainer.out.name] += 1
        return real(trainer, hr_windows)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    result = train_all(workplace)
    assert result.exit_code == 1, result.output
    assert "expected the whole of stage pruned, found 50% of it" in result.output
    assert not (workplace / "out" / "perceptual").exists()

    stop_at.clear()
    result = train_all(workplace)
    assert result.exit_code == 0, result.output
    assert steps == {stage.name: STEPS for stage in STAGES}
    for stage in STAGES:
        if stage.deliver:
            path = workplace / "out" / f"{stage.deliver}.safetensors"
            assert load_checkpoint(path).widths.name == stage.config.widths
            assert str(path) in result.output
            with safe_open(path, "pt") as file:
                recipe = json.loads(file.metadata()["recipe"])
            assert recipe["teacher"] == stage.config.teacher
            assert recipe["minutes"] == pytest.approx(600 * stage.share)
    kept = (workplace / "out" / "mst_gan_pruned.safetensors").read_bytes()

    result = train_all(workplace)
    assert result.exit_code == 0, result.output
    assert steps == {stage.name: STEPS for stage in STAGES}
    assert (workplace / "out" / "mst_gan_pruned.safetensors").read_bytes() == kept


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr = 1e-3", "expected [[stages]] in recipe"),
        ("[[stages]]\nshare = 1", "expected a name of stage 1 of recipe"),
        ('[[stages]]\nname = "a"\nshare = "half"', "expected a share of stage a of recipe"),
        ('[[stages]]\nname = "a"\nshare = 1\ninit = "b"', "expected init of stage a of recipe"),
        ('[[stages]]\nname = "a"\nshare = 1\nwidths = "huge"', "expected widths of stage a of recipe"),
        ('[[stages]]\nname = "a"\nshare = 1\nstart = "b"', "found 'start'; they are"),
        ('[[stages]]\nname = "a"\nshare = 1\nlr = "fast"', "expected lr in stage a of recipe"),
    ],
)
def test_faults_of_a_recipe_are_one_line(text: str, message: str, workplace: Path) -> None:
    (workplace / "mine.toml").write_text(text)
    result = train_all(workplace, "--recipe", workplace / "mine.toml")
    assert result.exit_code == 1
    assert message in result.output
    assert result.output.strip().count("\n") == 0


def test_nothing_is_trained_before_all_is_there(workplace: Path) -> None:
    (workplace / "vgg.pth").write_text("weights")
    result = train_all(workplace)
    assert result.exit_code == 1
    assert "expected weights of VGG19" in result.output
    assert not (workplace / "out").exists()
