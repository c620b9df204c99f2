"""Flow by calculus, and what the neighbours' own samples add to the centre frame."""

import pytest
import torch
import torch.nn.functional as F

from export.network.flow_align import NEWS_GAIN, FlowAlign, innovation
from export.network.lucas_kanade import LucasKanade
from export.network.warp import backward_warp, upsample_flow
from export.spec import NEUTRAL, SCALE

H, W = 40, 56


def texture(seed: int = 0, height: int = H, width: int = W) -> torch.Tensor:
    """(1, 1, H, W), grey: noise of every coarseness, the coarser the stronger, as in pictures."""
    generator = torch.Generator().manual_seed(seed)
    octaves = []
    for cell in (4, 8, 16, 32):
        noise = torch.rand(1, 1, height // cell + 2, width // cell + 2, generator=generator)
        octave = F.interpolate(noise, scale_factor=float(cell), mode="bicubic")[..., :height, :width]
        octaves.append(cell**0.5 * octave)
    image = torch.stack(octaves).sum(0)
    low, high = image.min(), image.max()
    normalised: torch.Tensor = (image - low) / (high - low)
    return normalised


def constant_flow(x: float, y: float, height: int = H, width: int = W) -> torch.Tensor:
    return torch.tensor([x, y]).view(1, 2, 1, 1).expand(1, 2, height, width).contiguous()


@pytest.mark.parametrize("shift", [(0.3, 0.0), (0.0, -0.4), (-0.6, 0.7)])
def test_calculus_finds_a_fraction_of_a_pixel(shift: tuple[float, float]) -> None:
    centre, motion = texture(), constant_flow(*shift)
    neighbours = torch.cat((backward_warp(centre, -motion), centre))
    found = torch.zeros(2, 2, H // 2, W // 2)
    for _ in range(3):
        found = LucasKanade()(centre.expand_as(neighbours), neighbours, found)
    assert found[1].abs().max() < 1e-4  # the second neighbour is the centre itself
    error = (upsample_flow(found[:1]) - motion).norm(dim=1)[:, 6:-6, 6:-6]
    assert error.mean() < 0.25 * motion.norm(dim=1).mean()  # not less: damped where the picture is flat


def test_calculus_leaves_flat_areas_alone() -> None:
    flat, flow = torch.full((1, 1, H, W), 0.5), constant_flow(1.5, -0.5, H // 2, W // 2)
    torch.testing.assert_close(LucasKanade()(flat, flat, flow), flow)


def test_calculus_passes_gradients_on_as_they_are() -> None:
    flow = constant_flow(0.1, 0.2, H // 2, W // 2).requires_grad_()
    LucasKanade()(texture(), texture(1), flow).sum().backward()
    assert flow.grad is not None
    assert torch.equal(flow.grad, torch.ones_like(flow))


@pytest.mark.parametrize("shift", [(8.0, 0.0), (0.0, -9.0), (5.5, 6.25)])
def test_untrained_flow_follows_a_camera(shift: tuple[float, float]) -> None:
    centre, flow = texture(2, 96, 128), constant_flow(*shift, 96, 128)
    neighbour = backward_warp(centre, -flow)
    frames = torch.stack((centre, centre, neighbour), dim=1).expand(-1, -1, 3, -1, -1)
    with torch.inference_mode():
        found, aligned, _ = FlowAlign().align(frames)
    assert found[0, :2].abs().max() < 1e-3  # the first neighbour stands still
    before, after = (
        float((image - centre[0])[:, 16:-16, 16:-16].abs().mean())
        for image in (neighbour[0], aligned[0, 4:5])
    )
    assert after < 0.2 * before


def test_nothing_is_new_where_nothing_moved() -> None:
    assert innovation(texture(), texture(), constant_flow(0, 0)).abs().max() < 0.01


def test_nothing_is_new_after_whole_pixels() -> None:
    frame = texture()
    news = innovation(frame, frame.roll((2, -3), (-2, -1)), constant_flow(-3, 2))
    assert news[..., 4:-4, 4:-4].abs().max() < 0.01


@pytest.mark.parametrize("row", range(SCALE))
@pytest.mark.parametrize("column", range(SCALE))
def test_news_land_on_the_sub_pixel_they_were_sampled_at(row: int, column: int) -> None:
    centre, surprise = torch.full((1, 1, H, W), 0.25), 0.1
    # The neighbour's sample lies at this sub-pixel's centre if the flow falls short of it by as much.
    x, y = ((index + 0.5) / SCALE - 0.5 for index in (column, row))
    news = innovation(centre, centre + surprise, constant_flow(-x, -y))
    expected = torch.zeros(SCALE**2)
    expected[SCALE * row + column] = 255 * NEWS_GAIN * surprise
    torch.testing.assert_close(news, expected.view(1, -1, 1, 1).expand_as(news), atol=1e-3, rtol=1e-5)


def test_large_surprises_are_misalignment_and_bounded() -> None:
    black, white = torch.zeros(1, 1, H, W), torch.ones(1, 1, H, W)
    assert innovation(black, white, constant_flow(0.125, 0.125)).max() == NEUTRAL - 1
