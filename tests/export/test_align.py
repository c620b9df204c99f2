"""Lucas-Kanade flow, and the residual of the neighbors' samples."""

import pytest
import torch
import torch.nn.functional as F

from export.network.align import REACH_PX, RESIDUAL_GAIN, FlowAlign, neighbor_residual
from export.network.flow import LucasKanade, backward_warp, upsample_flow
from export.spec import NEUTRAL, SCALE

H, W = 40, 56


def texture(seed: int = 0, height: int = H, width: int = W, coarsest: int = 32) -> torch.Tensor:
    """(1, 1, H, W), gray: noise of every coarseness, the coarser the stronger, as in pictures."""
    generator = torch.Generator().manual_seed(seed)
    octaves = []
    for cell in (4, 8, 16, 32, 64):
        if cell > coarsest:
            break
        noise = torch.rand(1, 1, height // cell + 2, width // cell + 2, generator=generator)
        octave = F.interpolate(noise, scale_factor=float(cell), mode="bicubic")[..., :height, :width]
        octaves.append(cell**0.5 * octave)
    image = torch.stack(octaves).sum(0)
    low, high = image.min(), image.max()
    normalized: torch.Tensor = (image - low) / (high - low)
    return normalized


def constant_flow(x: float, y: float, height: int = H, width: int = W) -> torch.Tensor:
    return torch.tensor([x, y]).view(1, 2, 1, 1).expand(1, 2, height, width).contiguous()


@pytest.mark.parametrize("shift", [(0.3, 0.0), (0.0, -0.4), (-0.6, 0.7)])
def test_a_step_finds_a_fraction_of_a_pixel(shift: tuple[float, float]) -> None:
    center, motion = texture(), constant_flow(*shift)
    neighbors = torch.cat((backward_warp(center, -motion), center))
    found = torch.zeros(2, 2, H // 2, W // 2)
    for _ in range(3):
        found = LucasKanade()(center.expand_as(neighbors), neighbors, found)
    assert found[1].abs().max() < 1e-4  # the second neighbor is the center itself
    error = (upsample_flow(found[:1]) - motion).norm(dim=1)[:, 6:-6, 6:-6]
    assert error.mean() < 0.25 * motion.norm(dim=1).mean()  # not less: damped where the picture is flat


def test_a_step_leaves_flat_areas_alone() -> None:
    flat, flow = torch.full((1, 1, H, W), 0.5), constant_flow(1.5, -0.5, H // 2, W // 2)
    torch.testing.assert_close(LucasKanade()(flat, flat, flow), flow)


def test_a_step_passes_gradients_on_as_they_are() -> None:
    flow = constant_flow(0.1, 0.2, H // 2, W // 2).requires_grad_()
    LucasKanade()(texture(), texture(1), flow).sum().backward()
    assert flow.grad is not None
    assert torch.equal(flow.grad, torch.ones_like(flow))


@pytest.mark.parametrize("shift", [(8.0, 0.0), (0.0, -9.0), (5.5, 6.25)])
def test_untrained_flow_follows_a_camera(shift: tuple[float, float]) -> None:
    center, flow = texture(2, 96, 128), constant_flow(*shift, 96, 128)
    neighbor = backward_warp(center, -flow)
    frames = torch.stack((center, center, neighbor), dim=1).expand(-1, -1, 3, -1, -1)
    with torch.inference_mode():
        found, aligned, _ = FlowAlign().align(frames)
    assert found[0, :2].abs().max() < 1e-3  # the first neighbor stands still
    before, after = (
        float((image - center[0])[:, 16:-16, 16:-16].abs().mean()) for image in (neighbor[0], aligned[0, 4:5])
    )
    assert after < 0.2 * before


def found_flow(shift: tuple[int, int]) -> torch.Tensor:
    """(2, h, w): flow in lr pixels between two views of one picture, away from their borders."""
    (x, y), margin = shift, 64
    picture = texture(1, 320, 384, coarsest=64)
    views = [
        picture[..., margin - dy : margin - dy + 192, margin - dx : margin - dx + 256]
        for dx, dy in ((0, 0), (0, 0), (x, y))
    ]
    frames = torch.stack(views, dim=1).expand(-1, -1, 3, -1, -1)
    with torch.inference_mode():
        _, _, half_flow = FlowAlign().align(frames)
    return 2 * half_flow[1, :, 24:-24, 24:-24]


@pytest.mark.parametrize("shift", [(4, 0), (0, -8), (-16, 0), (0, 24), (30, 0), (0, -30), (24, -24)])
def test_motion_up_to_the_reach_is_found(shift: tuple[int, int]) -> None:
    error = (found_flow(shift) - torch.tensor(shift).view(2, 1, 1)).norm(dim=0)
    assert error.median() < 0.1
    assert (error < 1).float().mean() > 0.99


@pytest.mark.parametrize("shift", [(36, 0), (0, -40)])
def test_motion_beyond_the_reach_is_not_claimed(shift: tuple[int, int]) -> None:
    found = found_flow(shift)
    error = (found - torch.tensor(shift).view(2, 1, 1)).norm(dim=0)
    assert error.median() > 1
    assert found.abs().max() < REACH_PX + 0.5


def test_nothing_remains_where_nothing_moved() -> None:
    assert neighbor_residual(texture(), texture(), constant_flow(0, 0)).abs().max() < 0.01


def test_nothing_remains_after_whole_pixels() -> None:
    frame = texture()
    residual = neighbor_residual(frame, frame.roll((2, -3), (-2, -1)), constant_flow(-3, 2))
    assert residual[..., 4:-4, 4:-4].abs().max() < 0.01


@pytest.mark.parametrize("row", range(SCALE))
@pytest.mark.parametrize("column", range(SCALE))
def test_residual_land_on_the_sub_pixel_they_were_sampled_at(row: int, column: int) -> None:
    center, difference = torch.full((1, 1, H, W), 0.25), 0.1
    # The neighbor's sample lies at this sub-pixel's center if the flow falls short of it by as much.
    x, y = ((index + 0.5) / SCALE - 0.5 for index in (column, row))
    residual = neighbor_residual(center, center + difference, constant_flow(-x, -y))
    expected = torch.zeros(SCALE**2)
    expected[SCALE * row + column] = 255 * RESIDUAL_GAIN * difference
    torch.testing.assert_close(residual, expected.view(1, -1, 1, 1).expand_as(residual), atol=1e-3, rtol=1e-5)


def test_large_differences_are_misalignment_and_bounded() -> None:
    black, white = torch.zeros(1, 1, H, W), torch.ones(1, 1, H, W)
    assert neighbor_residual(black, white, constant_flow(0.125, 0.125)).max() == NEUTRAL - 1
