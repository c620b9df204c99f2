"""The network against its budgets and against what its parts must do."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_network import LIGHT, TINY, random_window, shake

from export import spec
from export.network import BASELINE, COMPACT, PRUNED, STUDENT, MstGan, PyramidWidths, Widths, count
from export.network.align import FlowAlign
from export.network.flow import backward_warp, grayscale
from export.network.frames import frames_from_window, to_uint8
from export.network.layers import BicubicSubpixels, PixelShuffle


@pytest.mark.slow
@pytest.mark.parametrize(("widths", "parameters", "flops"), [(BASELINE, 28e6, 950e9), (PRUNED, 17e6, 570e9)])
def test_budgets(widths: Widths, parameters: float, flops: float) -> None:
    found_parameters, found_flops = count(widths, (720, 1280))
    assert found_parameters == pytest.approx(parameters, rel=0.03)
    assert found_flops == pytest.approx(flops, rel=0.03)


@pytest.mark.parametrize(("widths", "share"), [(COMPACT, 0.5), (STUDENT, 0.26)])
def test_light_networks_do_a_share_of_the_pruned_work(widths: Widths, share: float) -> None:
    assert count(widths)[1] / count(PRUNED)[1] == pytest.approx(share, abs=0.02)


def test_pruned_layers_are_slices_of_the_baselines() -> None:
    with torch.device("meta"):
        baseline, pruned = MstGan(BASELINE).state_dict(), MstGan(PRUNED).state_dict()
    assert baseline.keys() == pruned.keys()
    assert all(
        p <= b for name in baseline for p, b in zip(pruned[name].shape, baseline[name].shape, strict=True)
    )


def test_widths_suit_tensor_cores() -> None:
    for widths in (BASELINE, PRUNED, COMPACT, STUDENT):
        numbers = [widths.body, *widths.body_inner]
        if isinstance(widths, PyramidWidths):
            numbers += [*widths.encoder_inner, *widths.encoder_outer, *widths.laterals]
            numbers += [widths.stem, widths.context_inner, widths.up]
        assert all(number % 16 == 0 for number in numbers)


both = pytest.mark.parametrize("widths", [TINY, LIGHT], ids=lambda widths: widths.name)


@both
@pytest.mark.parametrize("size", [(16, 16), (20, 36), (36, 20), (4, 4), (64, 100), (180, 4)])
def test_any_multiple_of_four(size: tuple[int, int], widths: Widths) -> None:
    assert spec.MULTIPLE_OF == 4
    network = shake(MstGan(widths))
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


@both
def test_batch_members_do_not_meet(widths: Widths) -> None:
    network = shake(MstGan(widths))
    windows = random_window(3, 20, 24)
    with torch.inference_mode():
        together = network(windows).int()
        apart = torch.cat([network(window[None]) for window in windows]).int()
    assert (together - apart).abs().max() <= 1  # a last-bit difference may cross a rounding edge


@both
def test_all_three_frames_matter(widths: Widths) -> None:
    network = shake(MstGan(widths))
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


def test_untrained_flow_of_a_still_scene_is_zero() -> None:
    lr_window = random_window(1, 32, 48)[:, :1].expand(-1, spec.WINDOW, -1, -1, -1)
    with torch.inference_mode():
        flow, aligned = FlowAlign()(lr_window)
    assert flow.abs().max() < 1e-5
    frame, grays, residual = aligned.split((3, 2, spec.PHASES * 2), dim=1)
    assert torch.equal(frame, lr_window[:, 1].permute(0, 3, 1, 2))
    assert torch.equal(grays, to_uint8(grayscale(frame / 255)).expand_as(grays))
    assert (residual == spec.NEUTRAL).all()


def test_bicubic_skip_equals_pillow() -> None:
    frame = np.random.default_rng(0).random((24, 36), dtype=np.float32)
    image = Image.fromarray(frame, mode="F").resize((144, 96), Image.Resampling.BICUBIC)
    subpixels = BicubicSubpixels(1, spec.SCALE)(torch.from_numpy(frame)[None, None])
    ours = torch.pixel_shuffle(subpixels, spec.SCALE)[0, 0].numpy()
    inner = (slice(8, -8), slice(8, -8))  # Pillow renormalizes its kernel at the border, we repeat pixels
    np.testing.assert_allclose(ours[inner], np.asarray(image)[inner], atol=2e-6)


@both
def test_untrained_network_is_bicubic(widths: Widths) -> None:
    lr_window = random_window(2, 16, 20)
    with torch.inference_mode():
        answer = MstGan(widths)(lr_window)
        center = lr_window[:, 1].permute(0, 3, 1, 2).float() / 255
        expected = PixelShuffle()(to_uint8(BicubicSubpixels(3, spec.SCALE)(center)))
    assert torch.equal(answer, expected)


def test_bytes_are_clamped_and_round() -> None:
    levels = torch.tensor([-127.5, -0.1, 0.4, 0.6, 254.4, 254.6, 1000.0])
    assert to_uint8(levels / 255).tolist() == [0, 0, 0, 1, 254, 255, 255]


@pytest.mark.parametrize("batch", [1, 2])
def test_pixel_shuffle_is_torchs_with_channels_last(batch: int) -> None:
    hr = torch.randint(0, 256, (batch, 3, 8, 12), dtype=torch.uint8)
    answer = PixelShuffle()(torch.pixel_unshuffle(hr, spec.SCALE))
    assert answer.dtype == torch.uint8
    assert torch.equal(answer, hr.permute(0, 2, 3, 1))


def test_training_learns_from_what_is_not_rounded() -> None:
    generator = shake(MstGan(TINY)).generator
    lr_window = random_window(1, 20, 24)
    flow = torch.rand(spec.FLOW.shape(1, (20, 24)))
    aligned = torch.randint(0, 256, spec.ALIGNED.shape(1, (20, 24)), dtype=torch.uint8)
    with torch.inference_mode():
        unrounded = generator.generate(frames_from_window(lr_window), flow, aligned.float() / 255)
        rounded = generator(lr_window, flow, aligned)
    assert unrounded.dtype == torch.float32 and not torch.equal(255 * unrounded, (255 * unrounded).round())
    assert torch.equal(rounded, to_uint8(unrounded))
