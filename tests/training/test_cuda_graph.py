"""Steps on a GPU: clips in its memory, offsets from other processes, CUDA graphs captured and replayed."""

from __future__ import annotations

import csv
import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file
from tiny_network import LIGHT
from torch import Tensor

from export.data.clips import Clip
from export.data.windows import WindowSampler
from export.errors import ExportError
from export.training import gpu, trainer
from export.training.config import Config
from export.training.device import to_device
from export.training.gpu import CropOffsets, CudaGraphUpdate, GpuFootage, offsets_from
from export.training.interrupt import deferred_interrupt
from export.training.trainer import Trainer

CPU = torch.device("cpu")

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("tiny_widths")]


@pytest.fixture
def clips() -> list[Clip]:
    rng = np.random.default_rng(0)
    smooth = rng.integers(0, 255, (1, 7, 12, 12, 3)).repeat(8, 2).repeat(8, 3)
    return [Clip("blocks", smooth.astype(np.uint8))]


@pytest.fixture
def photos(clips: list[Clip]) -> list[Clip]:
    return [Clip("block", clips[0].segments[:, :1])]


def config(**changes: object) -> Config:
    small = {"widths": LIGHT.name, "steps": 6, "batch": 2, "patch": 64, "warmup": 2, "bf16": False}
    return Config(**{**small, **changes})  # type: ignore[arg-type]


def as_on_a_gpu(run: Trainer) -> Trainer:
    run.gpu_footage = GpuFootage(run.sampler, CPU)
    return run


class Eager:
    """Does what a graph would replay."""

    def __init__(self, update: gpu.Update, footage: GpuFootage) -> None:
        self.update, self.footage = update, footage

    def __call__(self, offsets: CropOffsets) -> dict[str, Tensor]:
        return self.update(self.footage.cut(offsets))


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "CudaGraphUpdate", Eager)
    monkeypatch.setattr(trainer, "LOG_EVERY", 3)


@pytest.mark.usefixtures("eager")
def test_graph_steps_are_the_same_steps(clips: list[Clip], photos: list[Clip], tmp_path: Path) -> None:
    Trainer(config(), clips, photos, clips, tmp_path / "steps").run()
    as_on_a_gpu(Trainer(config(), clips, photos, clips, tmp_path / "graph")).run()
    steps, replayed = (load_file(tmp_path / name / "ema.safetensors") for name in ("steps", "graph"))
    assert all(torch.equal(steps[name], replayed[name]) for name in steps)
    logs = [list(csv.DictReader((tmp_path / name / "log.csv").open())) for name in ("steps", "graph")]
    assert [row["step"] for row in logs[1]] == ["3", "6"]
    for row, same in zip(*logs, strict=True):
        assert float(row["pixel"]) == pytest.approx(float(same["pixel"]), rel=1e-5)
        assert row["gain_db"] == same["gain_db"]


@pytest.mark.usefixtures("eager")
def test_a_loss_that_is_no_number_stops_at_the_next_row_and_nothing_is_saved(
    clips: list[Clip], photos: list[Clip], tmp_path: Path
) -> None:
    run = as_on_a_gpu(Trainer(config(), clips, photos, clips, tmp_path / "run"))
    run.network.generator.head.bias.data.fill_(torch.nan)
    with pytest.raises(ExportError, match="expected a finite loss, found nan at step 3"):
        run.run()
    assert not (tmp_path / "run" / "state.pt").exists()


@pytest.mark.usefixtures("eager")
def test_nor_where_time_ends_between_two_rows(clips: list[Clip], photos: list[Clip], tmp_path: Path) -> None:
    run = as_on_a_gpu(Trainer(config(steps=2), clips, photos, clips, tmp_path / "run"))
    run.network.generator.head.bias.data.fill_(torch.nan)
    run._validate = lambda: {}  # type: ignore[method-assign]
    with pytest.raises(ExportError, match="expected a finite sum of weights, found nan at step 2"):
        run.run()
    assert not (tmp_path / "run" / "ema.safetensors").exists()


def test_a_discriminator_takes_no_graph(clips: list[Clip], photos: list[Clip], tmp_path: Path) -> None:
    run = Trainer(config(), clips, photos, clips, tmp_path / "run")
    assert run.can_use_graph
    run.adversarial = SimpleNamespace()  # type: ignore[assignment]
    assert not run.can_use_graph


def test_other_processes_sample_in_order(clips: list[Clip], photos: list[Clip]) -> None:
    sampler = WindowSampler(clips, photos, patch=64, photo_share=0.5, seed=1)
    footage = GpuFootage(sampler, CPU)
    found = offsets_from(5, footage, size=2, length=3)
    for step in range(5, 12):
        for mine, theirs in zip(footage.offsets(sampler.sample(step, 2), 3), next(found), strict=True):
            torch.testing.assert_close(mine, theirs, equal_nan=True)


def test_ctrl_c_is_not_for_the_processes_that_sample(clips: list[Clip], photos: list[Clip]) -> None:
    """Nor can they inherit a handler that makes them deaf to SIGTERM."""
    sampler = WindowSampler(clips, photos, patch=64, photo_share=0.5, seed=1)
    others = {child.pid for child in psutil.Process().children()}  # servers of other tests, say
    with deferred_interrupt():
        found = offsets_from(0, GpuFootage(sampler, CPU), size=2, length=3)
        for _ in range(gpu.MAX_WORKERS):  # batches come from each in turn: all of them are at work
            next(found)
        workers = [child.pid for child in psutil.Process().children() if child.pid not in others]
        masks = [Path(f"/proc/{pid}/status").read_text() for pid in workers]
        found.close()  # type: ignore[attr-defined]
    assert masks
    for mask in masks:
        ignored, caught = (
            int(mask.partition(f"{name}:\t")[2].split()[0], 16) for name in ("SigIgn", "SigCgt")
        )
        assert ignored >> (signal.SIGINT - 1) & 1
        assert not (caught | ignored) >> (signal.SIGTERM - 1) & 1


def test_one_graph_per_shape_after_a_warm_up(
    clips: list[Clip], photos: list[Clip], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a graph that does again what was done while it was recorded."""
    done: list[tuple[str, float]] = []
    footage = GpuFootage(WindowSampler(clips, photos, patch=64, photo_share=0.5, seed=1), CPU)

    class Graph:
        def pool(self) -> str:
            return "pool"

        def replay(self) -> None:
            _, inputs, answers = next(r for r in update.graphs.values() if r[0] is self)
            answers["mean"].copy_(step(footage.cut(inputs), "replayed")["mean"])

    @contextmanager
    def graph(graph: Graph, pool: str | None) -> Iterator[None]:
        assert pool == ("pool" if update.graphs else None)
        yield

    def step(batch: Tensor, how: str = "run") -> dict[str, Tensor]:
        done.append((how, float(batch.mean())))
        return {"mean": batch.mean()}

    for name, stand_in in {
        "Stream": lambda: SimpleNamespace(wait_stream=lambda other: None),
        "current_stream": lambda: SimpleNamespace(wait_stream=lambda other: None),
        "stream": lambda stream: nullcontext(),
        "CUDAGraph": Graph,
        "graph": graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
    update = CudaGraphUpdate(step, footage)
    found, expected = [], []
    for number in range(12):
        offsets = footage.offsets(footage.sampler.sample(number, 3), 3)
        expected.append(float(footage.cut(offsets).mean()))
        found.append(float(update(offsets)["mean"]))
    assert found == expected
    assert len(update.graphs) == 2  # one or two photos among three windows
    hows = [how for how, _ in done]
    assert hows.count("run") == gpu.WARM_UP + 2  # what is captured runs once
    assert hows.count("replayed") == 12 - gpu.WARM_UP


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU to capture on")
def test_on_a_gpu_what_is_replayed_is_what_was_captured(
    clips: list[Clip], photos: list[Clip], tmp_path: Path
) -> None:
    """The very weights, on an H200 with torch 2.11 after 150 steps."""
    torch.backends.cudnn.deterministic = True
    steps = Trainer(config(steps=50), clips, photos, clips, tmp_path / "steps")
    assert steps.gpu_footage
    for offsets in offsets_from(0, steps.gpu_footage, 2, 3):
        if steps.step == 50:
            break
        steps.train_step(steps.gpu_footage.cut(to_device(offsets, steps.device)))
    replayed = Trainer(config(steps=50), clips, photos, clips, tmp_path / "replayed")
    replayed.run()
    for mine, theirs in zip(steps.ema.parameters(), replayed.ema.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)
