"""Stages after the first: learning from a teacher, starting from a smaller network, saves that fail."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from made_up_footage import moving_clip
from tiny_network import LIGHT, TINY, random_window, shake

from export.checkpoint import load_checkpoint
from export.data.clips import Clip
from export.errors import ExportError
from export.network import WIDTHS, MstGan, Widths
from export.network.frames import frames_from_window
from export.training.config import Config
from export.training.grow import grow
from export.training.trainer import EMA_FILE, Trainer

STEPS = 4


pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("tiny_widths")]


@pytest.fixture(scope="module")
def clip() -> Clip:
    return moving_clip((10, 12), 12)


@pytest.fixture
def teacher() -> MstGan:
    return shake(MstGan(TINY))


def config(**changes: object) -> Config:
    small = {
        "widths": TINY.name, "steps": STEPS, "batch": 2, "patch": 64, "warmup": 1, "validate_every": 2,
        "bf16": False,
    }  # fmt: skip
    return Config(**{**small, **changes})


@pytest.mark.parametrize(
    "widths",
    [
        LIGHT,
        replace(LIGHT, body_inner=(16, 8, 8)),
        replace(TINY, body_inner=(16,)),
        replace(TINY, body=24, body_inner=(16, 16)),
    ],
)
def test_a_grown_network_answers_as_before(widths: Widths) -> None:
    small, window = shake(MstGan(LIGHT)), random_window(1, 36, 52)
    grown = grow(small, widths)
    assert grown.widths == widths
    with torch.inference_mode():
        expected, found = (
            network.generator.generate(frames_from_window(window), *network.flow_align(window))
            for network in (small, grown)
        )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_grown_network_trains_what_is_new(clip: Clip, tmp_path: Path) -> None:
    trainer = Trainer(config(), [clip], [], [clip], tmp_path / "run", shake(MstGan(LIGHT)))
    assert not trainer.network.generator.fuse.weight[:, LIGHT.body :].any()
    trainer.train_step(trainer.sampler.batch(0, 2))
    assert trainer.network.generator.fuse.weight[:, LIGHT.body :].any()


def test_a_network_does_not_shrink() -> None:
    with pytest.raises(ExportError, match=r"fits into the 'light' widths, found the 'tiny' widths, whose .*"):
        grow(MstGan(TINY), LIGHT)


@pytest.mark.parametrize("widths", [TINY.name, LIGHT.name])
def test_student_nears_its_teacher(clip: Clip, teacher: MstGan, tmp_path: Path, widths: str) -> None:
    o = config(steps=1000, widths=widths, lr=2e-3, teacher_weight=10.0)
    trainer = Trainer(o, [clip], [], [clip], tmp_path / "run", None, teacher)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    batch = trainer.sampler.batch(0, 2)
    distances = [trainer.train_step(batch)["teacher"] for _ in range(40)]
    assert distances[-1] < 0.8 * distances[0]
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())


def test_the_distance_to_the_teacher_is_weighted(clip: Clip, teacher: MstGan, tmp_path: Path) -> None:
    def total(weight: float) -> tuple[float, float]:
        o = config(teacher_weight=weight, feature_weight=0.0)
        trainer = Trainer(o, [clip], [], [clip], tmp_path / "run", None, teacher)
        loss, parts = trainer.loss(trainer.sampler.batch(0, 2))
        return loss.item(), float(parts["teacher"])

    (alone, distance), (both, _) = total(0.0), total(3.0)
    assert distance > 1e-3
    assert both - alone == pytest.approx(3 * distance, rel=1e-3)


def test_features_are_compared_through_adapters(
    clip: Clip, teacher: MstGan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slim = replace(TINY, name="slim", laterals=(8, 8, 8, 8), body=8)
    monkeypatch.setitem(WIDTHS, slim.name, slim)
    o = config(steps=1000, widths=slim.name, lr=2e-3, teacher_weight=3.0, feature_weight=1.0)
    trainer = Trainer(o, [clip], [], [clip], tmp_path / "run", None, teacher)
    batch = trainer.sampler.batch(0, 2)
    of_features = [trainer.train_step(batch)["features"] for _ in range(30)]
    assert of_features[-1] < 0.9 * of_features[0]
    trainer.save()
    again = Trainer(o, [clip], [], [clip], tmp_path / "run", None, teacher)
    expected, found = (t.distillation.adapters.state_dict() for t in (trainer, again) if t.distillation)
    assert expected
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert load_checkpoint(tmp_path / "run" / EMA_FILE).widths == slim  # adapters are not served


def test_a_network_is_its_own_perfect_teacher(clip: Clip, teacher: MstGan, tmp_path: Path) -> None:
    trainer = Trainer(config(), [clip], [], [clip], tmp_path / "run", teacher, teacher)
    _, parts = trainer.loss(trainer.sampler.batch(0, 2))
    assert float(parts["teacher"]) == pytest.approx(1e-3, abs=1e-6)  # Charbonnier of nothing
    assert parts["features"] < 1e-5


def test_flicker_is_weighted(clip: Clip, teacher: MstGan, tmp_path: Path) -> None:
    def total(weight: float) -> tuple[float, dict[str, torch.Tensor]]:
        o = config(temporal_weight=weight)
        trainer = Trainer(o, [clip], [], [clip], tmp_path / "run", teacher)
        loss, parts = trainer.loss(trainer.sampler.batch(0, 2, length=5))
        return loss.item(), parts

    (little, parts), (more, _) = total(1.0), total(3.0)
    assert parts["temporal"] > 1e-3
    assert more - little == pytest.approx(2 * float(parts["temporal"]), rel=1e-3)
    trainer = Trainer(config(temporal_weight=1.0), [clip], [], [clip], tmp_path / "trained", teacher)
    trainer.run()
    assert trainer.step == STEPS


def test_resumed_student_equals_an_unbroken_one(
    clip: Clip, teacher: MstGan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("export.training.trainer.LOG_EVERY", 2)
    o = config()

    def trainer(name: str) -> Trainer:
        return Trainer(o, [clip], [], [clip], tmp_path / name, None, teacher)

    trainer("whole").run()
    stopped = trainer("parts")
    for step in range(2):
        stopped.train_step(stopped.sampler.batch(step, 2))
    stopped.save()
    trainer("parts").run()
    whole, parts = (load_checkpoint(tmp_path / name / "ema.safetensors") for name in ("whole", "parts"))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, parts.state_dict()[name]), name
    rows = list(csv.DictReader((tmp_path / "whole" / "log.csv").open()))
    assert [row["step"] for row in rows] == ["2", "4"]
    assert all(float(row["teacher"]) > 0 for row in rows)


def test_full_disk_keeps_what_was_saved(clip: Clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    trainer = Trainer(config(), [clip], [], [clip], out)
    trainer.save()
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    trainer.train_step(trainer.sampler.batch(0, 2))

    def full(_: object, path: Path) -> None:
        Path(path).write_bytes(b"half of it")
        raise RuntimeError("PytorchStreamWriter failed writing file: no space left")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(ExportError, match=r"expected to save step 1 .* no space left; what was saved before"):
        trainer.save()
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_run_with_a_teacher_does_not_go_on_without(
    clip: Clip, teacher: MstGan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slim = replace(TINY, name="slim", body=8)
    monkeypatch.setitem(WIDTHS, slim.name, slim)
    o = config(widths=slim.name)
    Trainer(o, [clip], [], [clip], tmp_path, None, teacher).save()
    with pytest.raises(ExportError, match=r"expected .* trained tensors, found \d+: it had another teacher"):
        Trainer(o, [clip], [], [clip], tmp_path)


def test_state_of_an_older_version_is_refused(clip: Clip, tmp_path: Path) -> None:
    trainer = Trainer(config(), [clip], [], [clip], tmp_path)
    trainer.save()
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    del state["optimizer_name"]  # they had Adam alone
    torch.save(state, tmp_path / "state.pt")
    with pytest.raises(ExportError, match=r"expected .* of the optimizer 'muon', found .an older version's"):
        Trainer(config(), [clip], [], [clip], tmp_path)
