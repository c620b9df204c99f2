"""The training loop: resumed runs equal unbroken ones, faults keep the last state, commands train."""

import csv
import signal
import tempfile
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from tiny_network import LIGHT, TINY

from export.__main__ import main
from export.checkpoint import load_checkpoint
from export.data.clips import load_folder
from export.errors import ExportError
from export.network import WIDTHS
from export.training.config import Config
from export.training.device import warn_of_slow_bf16
from export.training.trainer import Trainer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("tiny_widths")]


def config(**changes: object) -> Config:
    small = {
        "widths": TINY.name, "steps": 6, "batch": 2, "patch": 64, "warmup": 2, "validate_every": 3,
        "bf16": False,
    }  # fmt: skip
    return Config(**{**small, **changes})  # type: ignore[arg-type]


def test_resumed_run_equals_an_unbroken_one(
    footage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("export.training.trainer.LOG_EVERY", 3)
    clips = load_folder(footage, tmp_path / "cache", min_side=64)
    Trainer(config(), clips, [], clips[:1], tmp_path / "whole").run()

    stopped = Trainer(config(), clips, [], clips[:1], tmp_path / "parts")
    for step in range(4):
        stopped.train_step(stopped.sampler.batch(step, 2))
    stopped.save()
    Trainer(config(), clips, [], clips[:1], tmp_path / "parts").run()

    whole, parts = (load_file(tmp_path / name / "ema.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    rows = list(csv.DictReader((tmp_path / "whole" / "log.csv").open()))
    assert [row["step"] for row in rows] == ["3", "6"]
    assert float(rows[-1]["gain_db"]) == pytest.approx(0, abs=1)


def test_an_interrupt_within_the_optimizer_leaves_whole_steps(footage: Path, tmp_path: Path) -> None:
    """Biases are updated before kernels: saved in between, a resumed run would update them twice."""
    clips = load_folder(footage, tmp_path / "cache", min_side=64)
    Trainer(config(), clips, [], clips[:1], tmp_path / "whole").run()
    stopped = Trainer(config(), clips, [], clips[:1], tmp_path / "parts")
    update_biases = stopped.optimizer.adam.step

    def interrupted() -> None:
        update_biases()
        if stopped.step == 2:
            signal.raise_signal(signal.SIGINT)

    stopped.optimizer.adam.step = interrupted  # type: ignore[method-assign]
    stopped.run()
    assert stopped.step == 3
    resumed = Trainer(config(), clips, [], clips[:1], tmp_path / "parts")
    assert resumed.step == 3
    resumed.run()
    whole, parts = (load_file(tmp_path / name / "ema.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_second_interrupt_stops_at_once(footage: Path, tmp_path: Path) -> None:
    clips = load_folder(footage, tmp_path / "cache", min_side=64)
    trainer = Trainer(config(), clips, [], clips[:1], tmp_path / "run")
    trainer.save()
    before = (tmp_path / "run" / "state.pt").read_bytes()

    def twice() -> None:
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)

    trainer.optimizer.step = twice  # type: ignore[assignment,method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert (tmp_path / "run" / "state.pt").read_bytes() == before
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_time_ends_a_run_and_a_resumed_one_has_what_was_left(
    footage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips = load_folder(footage, tmp_path / "cache", min_side=64)

    def trainer() -> Trainer:
        made = Trainer(config(steps=1000, minutes=0.1, warmup=0), clips, [], clips[:1], tmp_path / "run")
        monkeypatch.setattr("export.training.trainer.monotonic", lambda: float(made.step))  # a second a step
        return made

    first = trainer()
    first.spent_s = 2.0
    assert first.progress(0) == pytest.approx(1 / 3)
    first.save()
    second = trainer()
    assert second.learning_rate(0) == second.config.lr
    second.run()
    assert (second.step, second.spent_s) == (4, 6.0)
    assert second.learning_rate(4) == pytest.approx(second.config.final_lr)
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
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # torch's cache
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: real(function, backend="eager"))
    clips = load_folder(footage, tmp_path / "cache", min_side=64)
    plain, compiled = (
        Trainer(config(compile=c, widths=LIGHT.name), clips, [], clips[:1], tmp_path / f"run{c}")
        for c in (False, True)
    )
    batch = plain.sampler.batch(0, 2)
    assert compiled.align is not compiled.network.flow_align.align
    for _ in range(2):
        expected, found = plain.train_step(batch), compiled.train_step(batch)
        assert found == pytest.approx(expected, rel=1e-4)


def test_training_lowers_the_loss(footage: Path, tmp_path: Path) -> None:
    clips = load_folder(footage, tmp_path / "cache", min_side=64)
    trainer = Trainer(config(steps=1000, widths=LIGHT.name), clips, [], clips[:1], tmp_path / "run")
    batch = trainer.sampler.batch(0, 2)
    losses = [trainer.train_step(batch)["pixel"] for _ in range(20)]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(("capability", "is_slow"), [("AVX2", True), ("AVX512", False)])
def test_slow_bf16_is_warned_of(
    capability: str, is_slow: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    warn_of_slow_bf16(torch.device("cpu"))
    assert ("pass --fp32" in caplog.text) == is_slow


def test_run_of_other_widths_is_refused(
    footage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips = load_folder(footage, tmp_path / "cache", min_side=64)
    Trainer(config(), clips, [], clips[:1], tmp_path / "run").save()
    monkeypatch.setitem(WIDTHS, "other", TINY)
    with pytest.raises(ExportError, match=r"expected .* to hold a run of the 'other' widths, found 'tiny'"):
        Trainer(config(widths="other"), clips, [], clips[:1], tmp_path / "run")


def test_nan_loss_stops_and_keeps_the_last_state(footage: Path, tmp_path: Path) -> None:
    clips = load_folder(footage, tmp_path / "cache", min_side=64)
    trainer = Trainer(config(), clips, [], clips[:1], tmp_path / "run")
    trainer.save()
    before = (tmp_path / "run" / "state.pt").read_bytes()
    with pytest.raises(ExportError, match="expected a finite loss, found nan at step 0"):
        trainer.train_step(torch.full((2, 3, 3, 64, 64), torch.nan))
    assert (tmp_path / "run" / "state.pt").read_bytes() == before


def test_train_command(footage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("export.training.trainer.LOG_EVERY", 2)
    held_back = tmp_path / "validation.txt"
    held_back.write_text("held_back.mp4\n")
    arguments = [
        "train", "--line-art", 1, "--clips", footage, "--validation", held_back, "--out", tmp_path / "run",
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
