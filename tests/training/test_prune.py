"""Pruning: slicing equals masking, importance is the loss's own, the penalty shrinks what nothing needs."""

import csv
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from safetensors.torch import load_file
from tiny_network import TINY, shake
from torch import Tensor

from export.__main__ import main
from export.checkpoint import load_checkpoint, save_checkpoint
from export.data.clips import Clip
from export.errors import ExportError
from export.network import BASELINE, PRUNED, WIDTHS, MstGan, count
from export.training.config import Config
from export.training.prune import Group, SparseTrainer, find_groups, finish, prune, shrink_, taylor
from export.training.trainer import Trainer

pytestmark = pytest.mark.slow

WIDE = replace(
    TINY, name="wide", encoder_inner=(12, 16, 20, 24),
    context_inner=16, body_inner=(12,), up=16,
)  # fmt: skip
PLANTED = 5


@pytest.fixture(autouse=True)
def tiny_widths(monkeypatch: pytest.MonkeyPatch) -> None:
    for widths in (TINY, WIDE):
        monkeypatch.setitem(WIDTHS, widths.name, widths)
    monkeypatch.delenv("VSR_DEBUG", raising=False)


@pytest.fixture
def wide() -> MstGan:
    return shake(MstGan(WIDE))


def moving(seed: int) -> np.ndarray:
    """7 frames, 96x128, of smoothed noise that moves by a pixel a frame."""
    noise = np.random.default_rng(seed).integers(0, 255, (10, 16, 3), dtype=np.uint8)
    picture = np.asarray(Image.fromarray(noise).resize((200, 120), Image.Resampling.BICUBIC))
    return np.stack([picture[t : t + 96, t : t + 128] for t in range(7)])


def sparse_trainer(out: Path, init: MstGan, sparsity: float = 0.1, **changes: object) -> SparseTrainer:
    small = {
        "widths": WIDE.name, "steps": 4, "batch": 2, "patch": 64, "warmup": 1, "bf16": False,
    }  # fmt: skip
    clip = Clip("clip", moving(0)[None])
    config = Config(**{**small, "sparsity": sparsity, **changes})  # type: ignore[arg-type]
    return SparseTrainer(find_groups(WIDE, TINY), config, [clip], [], [clip], out, init)


def answer(network: MstGan) -> Tensor:
    """Sub-pixels of a random window."""
    frames = torch.rand(1, 3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    flow, aligned, _ = network.flow_align.align(frames)
    return network.generator.generate(frames, flow, aligned)


@contextmanager
def gated(network: MstGan, gates: dict[str, Tensor]) -> Iterator[None]:
    """Multiply the channels that a layer reads by its gates: knows nothing of rows, columns and shuffles."""

    def gate(factors: Tensor) -> Callable[..., tuple[Tensor]]:
        return lambda _, inputs: (inputs[0] * factors[:, None, None],)

    with ExitStack() as stack:
        for name, factors in gates.items():
            handle = network.get_submodule(name).register_forward_pre_hook(gate(factors))
            stack.callback(handle.remove)
        yield


def random_importance(groups: list[Group]) -> dict[str, Tensor]:
    torch.manual_seed(2)
    return {group.producer: torch.rand(group.channels) for group in groups}


def test_every_kind_of_layer_is_a_group() -> None:
    groups = {group.producer: group for group in find_groups(WIDE, TINY)}
    assert len(groups) == 4 * 2 + 1 + 1 + 1
    up = groups["generator.up2"]
    assert (up.consumer, up.channels, up.kept, up.rows) == ("generator.up1", 16, 8, 4)


def test_slicing_equals_masking(wide: MstGan) -> None:
    groups = find_groups(WIDE, TINY)
    importance = random_importance(groups)
    pruned, report = prune(wide, TINY, importance)
    masks = {
        group.consumer: (
            importance[group.producer] >= importance[group.producer].sort().values[-group.kept]
        ).float()
        for group in groups
    }
    with torch.no_grad():
        whole, cut = answer(wide), answer(pruned)
        with gated(wide, masks):
            masked = answer(wide)
    assert (cut - masked).abs().max() < 3e-6
    assert (masked - whole).abs().max() > 1e-4  # the removed channels had an effect
    assert pruned.widths == TINY
    for layer, group in zip(report, groups, strict=True):
        weighed = importance[group.producer].double()
        assert (layer.layer, layer.channels, layer.kept) == (group.producer, group.channels, group.kept)
        assert layer.kept_importance == pytest.approx(
            (weighed.topk(group.kept).values.sum() / weighed.sum()).item()
        )
        assert layer.kept_importance + layer.removed_importance == pytest.approx(1)


def test_importance_is_the_slope_of_the_loss_along_a_channel(wide: MstGan) -> None:
    wide.requires_grad_(True)
    groups = find_groups(WIDE, TINY)
    gates = {group.consumer: torch.ones(group.channels, requires_grad=True) for group in groups}
    with gated(wide, gates):
        subpixels = answer(wide)
    (subpixels - 0.5).square().sum().backward()
    weights = dict(wide.named_parameters())
    gradients = {name: weight.grad for name, weight in weights.items() if weight.grad is not None}
    for group in groups:
        slope = gates[group.consumer].grad
        assert slope is not None
        assert slope.abs().max() > 0, group.consumer
        found = taylor(group, weights, gradients).detach()
        assert (found - 2 * slope.abs()).abs().max() < 1e-3 * slope.abs().max(), group.consumer


def test_planted_channel_is_kept(wide: MstGan, tmp_path: Path) -> None:
    with torch.no_grad():
        for group in find_groups(WIDE, TINY):
            columns = wide.get_parameter(f"{group.consumer}.weight")
            planted = columns[:, PLANTED].clone()
            columns.mul_(1e-3)
            columns[:, PLANTED] = planted
            # Never off: a positive bias on all rows that the planted channel is made of.
            rows = slice(PLANTED * group.rows, (PLANTED + 1) * group.rows)
            wide.get_parameter(f"{group.producer}.bias")[rows] = 0.5
    trainer = sparse_trainer(tmp_path / "run", wide)
    trainer.train_step(trainer.sampler.batch(0, 2))
    for maker, weighed in trainer.importance.items():
        assert weighed.argmax() == PLANTED, maker


def test_penalty_shrinks_what_the_loss_does_not_hold(wide: MstGan, tmp_path: Path) -> None:
    layer = "generator.context.0.conv1"
    with torch.no_grad():  # a channel that is never on
        wide.get_parameter(f"{layer}.weight")[3] *= 0.01
        wide.get_parameter(f"{layer}.bias")[3] = -1

    def rms(network: MstGan) -> float:
        tensors = (
            network.get_parameter(f"{layer}.weight")[3],
            network.get_parameter(f"{layer}.bias")[3:4],
            network.get_parameter("generator.context.0.conv2.weight")[:, 3],
        )
        return torch.cat([tensor.detach().flatten() for tensor in tensors]).square().mean().sqrt().item()

    changes = {}
    for sparsity in (0.0, 0.5):
        trainer = sparse_trainer(tmp_path / str(sparsity), wide, sparsity, lr=1e-3, decay_share=0.1)
        for step in range(3):
            trainer.train_step(trainer.sampler.batch(step, 2))
        changes[sparsity] = rms(wide) - rms(trainer.network)
        assert trainer.importance[layer][3] == 0
        assert trainer.importance[layer].max() > 0
    assert changes[0.0] == 0
    assert changes[0.5] == pytest.approx(3 * 0.5 * 1e-3, rel=1e-3)


def test_no_step_silences_a_channel(wide: MstGan) -> None:
    group = find_groups(WIDE, TINY)[-1]
    weights = {name: wide.get_parameter(name).detach() for name in group.names}
    before = {name: weight.clone() for name, weight in weights.items()}
    shrink_(group, weights, 1e3)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, 0.9 * before[name])


def test_full_disk_keeps_what_was_saved(
    wide: MstGan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = sparse_trainer(tmp_path / "run", wide, steps=1)
    trainer.train_step(trainer.sampler.batch(0, 2))
    trainer.save()
    before = load_file(tmp_path / "run" / "importance.safetensors")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("export.training.prune.save_checkpoint", fail)
    with pytest.raises(ExportError, match=r"expected to write .*No space left.*the same command writes them"):
        finish(trainer, TINY, tmp_path / "pruned.safetensors")
    monkeypatch.setattr("export.training.prune.save_file", fail)
    with pytest.raises(ExportError, match=r"expected to save the importance .*No space left"):
        trainer.save()
    again = load_file(tmp_path / "run" / "importance.safetensors")
    assert all(torch.equal(before[name], again[name]) for name in before)


def test_baseline_becomes_a_loadable_pruned_checkpoint(tmp_path: Path) -> None:
    groups = find_groups(BASELINE, PRUNED)
    pruned, _ = prune(MstGan(BASELINE), PRUNED, random_importance(groups))
    save_checkpoint(pruned, tmp_path / "pruned.safetensors", {})
    loaded = load_checkpoint(tmp_path / "pruned.safetensors")
    assert loaded.widths == PRUNED
    assert sum(p.numel() for p in loaded.parameters()) == count(PRUNED, (64, 64))[0]


def test_layers_without_importance_are_named(wide: MstGan, caplog: pytest.LogCaptureFixture) -> None:
    importance = random_importance(find_groups(WIDE, TINY))
    with caplog.at_level("WARNING", "export"):
        prune(wide, TINY, importance)
        assert not caplog.text
        importance["generator.up2"].zero_()
        prune(wide, TINY, importance)
    assert "1 layers, as generator.up2, have no importance" in caplog.text


@pytest.mark.parametrize(
    ("wide_widths", "narrow_widths"),
    [(PRUNED, PRUNED), (PRUNED, BASELINE), (WIDE, PRUNED), (WIDE, replace(TINY, body=8)),
     (WIDE, replace(TINY, up=32)), (WIDE, replace(TINY, context_blocks=2))],
)  # fmt: skip
def test_other_widths_are_refused(wide_widths: object, narrow_widths: object) -> None:
    with pytest.raises(ExportError, match="expected a checkpoint that holds more inner channels"):
        find_groups(wide_widths, narrow_widths)  # type: ignore[arg-type]


def test_a_resumed_run_has_the_importance_of_an_unbroken_one(wide: MstGan, tmp_path: Path) -> None:
    whole = sparse_trainer(tmp_path / "whole", wide)
    whole.run()
    stopped = sparse_trainer(tmp_path / "parts", wide)
    for step in range(2):
        stopped.train_step(stopped.sampler.batch(step, 2))
    stopped.save()
    with pytest.raises(
        ExportError, match="expected the whole run before channels go, found 50% of it, 2 steps"
    ):
        finish(stopped, TINY, tmp_path / "early.safetensors")
    assert not (tmp_path / "early.safetensors").exists()
    parts = sparse_trainer(tmp_path / "parts", wide)
    assert parts.step == 2
    parts.run()
    for name, weighed in whole.importance.items():
        assert torch.equal(weighed, parts.importance[name])
        assert weighed.max() > 0


def test_a_run_without_importance_is_refused(wide: MstGan, tmp_path: Path) -> None:
    sparse = sparse_trainer(tmp_path / "unused", wide)
    plain = Trainer(sparse.config, sparse.sampler.clips, [], sparse.validation, tmp_path / "run", wide)
    plain.train_step(plain.sampler.batch(0, 2))
    plain.save()
    with pytest.raises(ExportError, match="found none that fits"):
        sparse_trainer(tmp_path / "run", wide)


@pytest.fixture
def footage(tmp_path: Path) -> Path:
    for seed, name in enumerate(("pan", "held_back")):
        (tmp_path / "footage" / name).mkdir(parents=True)
        for index, frame in enumerate(moving(seed)):
            Image.fromarray(frame).save(tmp_path / "footage" / name / f"{index}.png")
    (tmp_path / "validation.txt").write_text("held_back\n")
    return tmp_path / "footage"


def run_prune(checkpoint: Path, footage: Path, out: Path, *options: object) -> Result:
    arguments = [
        "prune", "--line-art", 0, "--checkpoint", checkpoint, "--clips", footage,
        "--validation", footage.parent / "validation.txt", "--cache", footage.parent / "cache",
        "--out", out, "--prune-to", TINY.name, "--steps", 2, "--batch", 1, "--patch", 64, "--fp32", *options,
    ]  # fmt: skip
    return CliRunner().invoke(main, list(map(str, arguments)))


@pytest.mark.slow
def test_prune_command(wide: MstGan, footage: Path, tmp_path: Path) -> None:
    checkpoint, out = tmp_path / "wide.safetensors", tmp_path / "pruned.safetensors"
    save_checkpoint(wide, checkpoint, {})
    result = run_prune(checkpoint, footage, out)
    assert result.exit_code == 0, result.output
    assert "before fine-tuning" in result.output
    assert load_checkpoint(out).widths == TINY
    report = json.loads(out.with_suffix(".json").read_text())
    rows = list(csv.DictReader(out.with_suffix(".csv").open()))
    groups = find_groups(WIDE, TINY)
    assert [layer["layer"] for layer in report["layers"]] == [row["layer"] for row in rows]
    assert [int(row["kept"]) for row in rows] == [group.kept for group in groups]
    assert report["recipe"]["pruned_from"] == WIDE.name

    first = load_file(out)
    out.unlink()
    assert run_prune(checkpoint, footage, out).exit_code == 0  # goes on from the finished run
    again = load_file(out)
    assert all(torch.equal(first[name], again[name]) for name in first)

    trained = CliRunner().invoke(
        main,
        list(map(str, [
            "train", "--line-art", 0, "--clips", footage, "--validation", footage.parent / "validation.txt",
            "--cache", footage.parent / "cache", "--out", tmp_path / "tuned", "--widths", TINY.name,
            "--init", out, "--teacher", checkpoint, "--steps", 1, "--batch", 1, "--patch", 64, "--fp32",
        ])),
    )  # fmt: skip
    assert trained.exit_code == 0, trained.output


def test_bad_input_is_refused_in_one_line(wide: MstGan, footage: Path, tmp_path: Path) -> None:
    checkpoint, out = tmp_path / "tiny.safetensors", tmp_path / "out.safetensors"
    save_checkpoint(MstGan(TINY), checkpoint, {})
    for options, message in (
        ((), "expected a checkpoint that holds more inner channels than the 'tiny' widths"),
        (("--prune-to", "none"), "expected --prune-to to be one of"),
        (("--steps", 0), "expected steps in"),
        (("--sparsity", -1), "expected sparsity in"),
        (("--patch", 60), "expected --patch to be a multiple of"),
        (("--out", tmp_path / "pruned.pt"), "expected --out to end in .safetensors"),
    ):
        result = run_prune(checkpoint, footage, out, *options)
        assert result.exit_code == 1
        assert message in result.output
        assert result.output.strip().count("\n") == 0
    assert not out.exists()
