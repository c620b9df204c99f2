"""Weights on INT8's grid: which one, what is served, and that answers change less than by nearest levels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from tiny_network import LIGHT, TINY, shake
from torch import Tensor

from export import spec, targets
from export.checkpoint import load_checkpoint
from export.data.sample import calibration_windows, reduced_windows
from export.network import MstGan
from export.network.layers import convolutions
from export.onnx.int8 import CPU_WEIGHT_LEVEL
from export.onnx.rounding import rounded_weights, with_weights
from export.repository import stage_path

LEVEL = 16  # coarse, so that what rounding costs stands out


def generator_inputs(network: MstGan, lr_window: np.ndarray) -> list[Tensor]:
    frames = torch.from_numpy(lr_window)
    with torch.inference_mode():
        return [frames, *network.flow_align(frames)]


def to_nearest(weight: Tensor) -> Tensor:
    scale = weight.abs().amax((1, 2, 3), keepdim=True) / LEVEL
    return (weight / scale).round() * scale


@pytest.fixture(scope="module")
def light() -> MstGan:
    return shake(MstGan(LIGHT))


@pytest.fixture(scope="module")
def rounded(light: MstGan) -> dict[str, Tensor]:
    windows = [generator_inputs(light, window) for window in calibration_windows()[:4]]
    return rounded_weights(light.generator, windows, LEVEL)


def test_every_weight_is_on_the_grid_that_its_filters_largest_spans(
    light: MstGan, rounded: dict[str, Tensor]
) -> None:
    layers = convolutions(light.generator)
    assert rounded.keys() == layers.keys()
    for name, conv in layers.items():
        largest = conv.weight.abs().amax((1, 2, 3), keepdim=True)
        torch.testing.assert_close(rounded[name].abs().amax((1, 2, 3), keepdim=True), largest)
        levels = rounded[name] / largest * LEVEL
        torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)


def test_answers_of_every_layer_change_less_than_by_the_nearest_level(
    light: MstGan, rounded: dict[str, Tensor]
) -> None:
    """On a clip's later frames, of which it has seen none."""
    seen = {}
    hooks = [
        conv.register_forward_pre_hook(lambda conv, args: seen.update({conv: args[0]}))
        for conv in convolutions(light.generator).values()
    ]
    with torch.inference_mode():
        light.generator(*generator_inputs(light, reduced_windows(150, 1)[0]))
        for name, conv in convolutions(light.generator).items():
            x, weight = seen[conv], conv.weight
            ours, nearest = (
                float(F.conv2d(x, other - weight, padding=conv.padding).square().mean())  # type: ignore[arg-type]
                for other in (rounded[name], to_nearest(weight))
            )
            assert ours < 0.5 * nearest, name
    for hook in hooks:
        hook.remove()


def test_a_layer_seen_in_too_few_places_is_rounded_to_the_nearest() -> None:
    network = shake(MstGan(TINY))
    small = generator_inputs(network, calibration_windows()[0][:, :, :32, :32])
    rounded = rounded_weights(network.generator, [small], LEVEL)
    name = "encoder.layer4.0.spatial"  # one place, 72 inputs
    weight = convolutions(network.generator)[name].weight
    torch.testing.assert_close(rounded[name], to_nearest(weight))


def test_what_was_rounded_is_what_is_served(
    checkpoint: Path, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounded: dict[str, Tensor] = {}

    def kept(*args: Any) -> dict[str, Tensor]:
        rounded.update(rounded_weights(*args))
        return rounded

    monkeypatch.setattr(targets, "rounded_weights", kept)
    monkeypatch.setattr(targets, "compare_generator", lambda *_, **__: None)
    stages = {stage.name: stage_path(built / "build", stage) for stage in spec.STAGES}
    targets.build_generator("cpu", load_checkpoint(checkpoint), stages, tmp_path, calibration_windows()[:2])
    graph = onnx.load(tmp_path / "generator.int8.onnx").graph
    served = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for name in ("stem", "fuse", "body.0.conv2", "head"):
        weight = rounded[name]
        levels = (weight / weight.abs().amax((1, 2, 3), keepdim=True) * CPU_WEIGHT_LEVEL).round().numpy()
        stored = served[f"{name}.weight_quantized"]
        assert np.array_equal(stored[:, : levels.shape[1]], levels), name


def test_other_weights_stay(built: Path) -> None:
    model = onnx.load(built / "build/generator.onnx")
    before = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    halves = torch.full(before["fuse.weight"].shape, 0.5)
    changed = with_weights(model, {"fuse": halves}).graph.initializer
    expected = before | {"fuse.weight": halves.numpy()}
    for tensor in changed:
        assert np.array_equal(numpy_helper.to_array(tensor), expected[tensor.name]), tensor.name
    assert len(changed) == len(expected)
