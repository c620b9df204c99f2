"""The network against its budgets and against what its parts must do."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_network import TINY, random_window, shake

from export import spec
from export.network import BASELINE, PRUNED, MstGan, Widths, count
from export.network.bicubic import BicubicSubpixels
from export.network.flow_align import FlowAlign
from export.network.pixel_shuffle import PixelShuffle
from export.network.warp import backward_warp


@pytest.mark.parametrize(("widths", "parameters", "flops"), [(BASELINE, 28e6, 950e9), (PRUNED, 17e6, 570e9)])
def test_budgets(widths: Widths, parameters: float, flops: float) -> None:
    found_parameters, found_flops = count(widths, (720, 1280))
    assert found_parameters == pytest.approx(parameters, rel=0.03)
    assert found_flops == pytest.approx(flops, rel=0.03)


def test_pruned_layers_are_slices_of_the_baselines() -> None:
    with torch.device("meta"):
        baseline, pruned = MstGan(BASELINE).state_dict(), MstGan(PRUNED).state_dict()
    assert baseline.keys() == pruned.keys()
    assert all(
        p <= b for name in baseline for p, b in zip(pruned[name].shape, baseline[name].shape, strict=True)
    )


def test_widths_suit_tensor_cores() -> None:
    for widths in (BASELINE, PRUNED):
        numbers = [
            *widths.flow,
            widths.flow_refine,
            *widths.encoder_inner,
            *widths.encoder_outer,
            *widths.laterals,
        ]
        numbers += [widths.context_inner, widths.detail_inner, widths.up, widths.detail]
        assert all(number % 16 == 0 for number in numbers)


@pytest.mark.parametrize("size", [(16, 16), (20, 36), (36, 20), (4, 4), (64, 100), (180, 4)])
def test_any_multiple_of_four(size: tuple[int, int]) -> None:
    assert spec.MULTIPLE_OF == 4
    network = shake(MstGan(TINY))
    lr_window = random_window(2, *size)
    with torch.inference_mode():
        flow, aligned = network.flow_align(lr_window)
        subpixels = network.generator(lr_window, flow, aligned)
        hr_frame = network.pixel_shuffle(subpixels)
    for tensor, expected in (
        (flow, spec.FLOW), (aligned, spec.ALIGNED), (subpixels, spec.SUBPIXELS), (hr_frame, spec.HR_FRAME),
    ):  # fmt: skip
        assert tuple(tensor.shape) == expected.shape(2, size)
    assert hr_frame.dtype == torch.uint8


def test_batch_members_do_not_meet() -> None:
    network = shake(MstGan(TINY))
    windows = random_window(3, 20, 24)
    with torch.inference_mode():
        together = network(windows).int()
        apart = torch.cat([network(window[None]) for window in windows]).int()
    assert (together - apart).abs().max() <= 1  # a last-bit difference may cross a rounding edge


def test_all_three_frames_matter() -> None:
    network = shake(MstGan(TINY))
    lr_window = random_window(1, 32, 32)
    with torch.inference_mode():
        before = network(lr_window)
        for frame in range(spec.WINDOW):
            changed = lr_window.clone()
            changed[:, frame] = 255 - changed[:, frame]
            assert not torch.equal(network(changed), before), f"frame {frame} is ignored"


def test_zero_flow_is_identity() -> None:
    image = torch.rand(2, 3, 37, 1280)
    torch.testing.assert_close(backward_warp(image, torch.zeros(2, 2, 37, 1280)), image, atol=2e-4, rtol=0)


@pytest.mark.parametrize(("channel", "axis"), [(0, -1), (1, -2)])
@pytest.mark.parametrize("pixels", [-3, 1, 5])
def test_integer_flow_is_a_shift(channel: int, axis: int, pixels: int) -> None:
    image = torch.rand(1, 3, 24, 40)
    flow = torch.zeros(1, 2, 24, 40)
    flow[:, channel] = pixels
    warped = backward_warp(image, flow)
    expected = image.roll(-pixels, axis)
    kept = slice(max(0, -pixels), image.shape[axis] - max(0, pixels))
    inner = (..., kept) if axis == -1 else (..., kept, slice(None))
    torch.testing.assert_close(warped[inner], expected[inner], atol=1e-4, rtol=0)
    other = -2 if axis == -1 else -1
    assert not torch.allclose(warped, image.roll(-pixels, other), atol=1e-2)


def test_warp_repeats_the_border() -> None:
    image = torch.rand(1, 1, 4, 8)
    flow = torch.zeros(1, 2, 4, 8)
    flow[:, 0] = 100
    torch.testing.assert_close(backward_warp(image, flow), image[..., -1:].expand_as(image))


def test_untrained_flow_is_zero() -> None:
    lr_window = random_window(1, 32, 48)
    with torch.inference_mode():
        flow, aligned = FlowAlign(TINY)(lr_window)
    assert not flow.any()
    expected = lr_window.permute(0, 1, 4, 2, 3).reshape(1, 9, 32, 48).float() / 255
    torch.testing.assert_close(aligned, expected, atol=1e-4, rtol=0)


def test_bicubic_skip_equals_pillow() -> None:
    frame = np.random.default_rng(0).random((24, 36), dtype=np.float32)
    image = Image.fromarray(frame, mode="F").resize((144, 96), Image.Resampling.BICUBIC)
    subpixels = BicubicSubpixels(1, spec.SCALE)(torch.from_numpy(frame)[None, None])
    ours = torch.pixel_shuffle(subpixels, spec.SCALE)[0, 0].numpy()
    inner = (slice(8, -8), slice(8, -8))  # Pillow renormalises its kernel at the border, we repeat pixels
    np.testing.assert_allclose(ours[inner], np.asarray(image)[inner], atol=2e-6)


def test_untrained_network_is_bicubic() -> None:
    lr_window = random_window(2, 16, 20)
    with torch.inference_mode():
        answer = MstGan(TINY)(lr_window)
        centre = lr_window[:, 1].permute(0, 3, 1, 2).float() / 255
        expected = PixelShuffle()(BicubicSubpixels(3, spec.SCALE)(centre))
    assert torch.equal(answer, expected)


def test_pixel_shuffle_rounds_clamps_and_orders() -> None:
    hr = torch.rand(1, 3, 8, 12)
    hr[0, 0, 0, :2] = torch.tensor([-0.5, 1.5])
    answer = PixelShuffle()(torch.pixel_unshuffle(hr, spec.SCALE))
    expected = (hr.clamp(0, 1) * 255).round().to(torch.uint8)
    assert answer.shape == (1, 8, 12, 3)
    assert torch.equal(answer.permute(0, 3, 1, 2), expected)
