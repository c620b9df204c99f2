"""The whole recipe at toy scale: every stage in order, all checkpoints, stopped and gone on with."""

import json
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
from tiny_network import LIGHT, TINY, export_single_image
from torch import nn

from export.__main__ import main
from export.checkpoint import load_checkpoint
from export.data.clips import SEGMENT
from export.metrics.lpips import BACKBONE_FILE, HEADS_FILE, Lpips
from export.network import WIDTHS
from export.training.perceptual import DistilledVgg
from export.training.recipe import RESERVE, STAGES, planned
from export.training.trainer import Trainer

WIDE = replace(TINY, name="baseline", detail_inner=(16,), context_inner=16)
STEPS = 2
STAGES_BY_NAME = {stage.name: stage for stage in STAGES}


@pytest.fixture(autouse=True)
def tiny_widths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VSR_DEBUG", raising=False)
    for name, widths in (
        ("baseline_trunk", replace(LIGHT, detail_inner=(16,))),
        ("pruned", TINY),
        ("compact", LIGHT),
        ("student", replace(LIGHT, detail_inner=(8, 8))),
    ):
        monkeypatch.setitem(WIDTHS, name, replace(widths, name=name))
    monkeypatch.setitem(WIDTHS, WIDE.name, WIDE)


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """Footage of two moving pictures, one held back, and random weights in the published layouts."""
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
    export_single_image(nn.Sequential(nn.Conv2d(3, 48, 1), nn.PixelShuffle(4)), tmp_path / "single.pt2")
    return tmp_path


def train_all(folder: Path) -> Result:
    arguments = [
        "train-all", "--drawings", 1, "--clips", folder / "clips", "--validation", folder / "held_back.txt",
        "--cache", folder / "cache", "--out", folder / "out", "--perceptual", folder / "vgg.pth",
        "--weights", folder, "--teacher", folder / "single.pt2", "--minutes", 600,
        "--steps", STEPS, "--batch", 3, "--patch", 64,
    ]  # fmt: skip
    return CliRunner().invoke(main, list(map(str, arguments)))


def test_stages_share_the_time_in_a_possible_order() -> None:
    assert [stage.name for stage in planned()] == [stage.name for stage in STAGES]
    assert sum(stage.share for stage in planned()) == pytest.approx(1 - RESERVE)
    made = set()
    for stage in STAGES:  # nothing is asked for before it is there
        assert {stage.start, stage.teacher} <= made | {None}
        made.add(stage.name)


def test_recipe_is_stopped_and_gone_on_with(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_at: list[tuple[str, int]] = [("pruned", 1)]
    steps: Counter[str] = Counter()
    real = Trainer.train_step

    def train_step(trainer: Trainer, batch: object) -> dict[str, float]:
        if (trainer.out.name, trainer.step) in stop_at:
            raise KeyboardInterrupt
        steps[trainer.out.name] += 1
        return real(trainer, batch)  # type: ignore[arg-type]

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
        if stage.delivers:
            path = workplace / "out" / f"{stage.delivers}.safetensors"
            assert load_checkpoint(path).widths.name == stage.widths
            assert str(path) in result.output
            with safe_open(path, "pt") as file:
                teachers = json.loads(file.metadata()["recipe"])["teachers"]
            own = [STAGES_BY_NAME[stage.teacher].widths] if stage.teacher else []
            assert teachers == ([] if stage.objective == "adversarial" else [*own, "single"])
    kept = (workplace / "out" / "mst_gan_pruned.safetensors").read_bytes()

    result = train_all(workplace)
    assert result.exit_code == 0, result.output
    assert steps == {stage.name: STEPS for stage in STAGES}
    assert (workplace / "out" / "mst_gan_pruned.safetensors").read_bytes() == kept


def test_nothing_is_trained_before_all_is_there(workplace: Path) -> None:
    (workplace / "vgg.pth").write_text("weights")
    result = train_all(workplace)
    assert result.exit_code == 1
    assert "expected weights of VGG19" in result.output
    assert not (workplace / "out").exists()
