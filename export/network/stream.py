"""The recurrent network: one frame and the state in, its hr frame and the next state out.

Two stages, each with a state of its own, so that Triton's implicit state can carry it:

- `StreamAlign` keeps the previous lr frame. It estimates the flow to it and takes its sub-pixel samples.
- `StreamGenerator` keeps 32 bytes per lr pixel: 16 features of its body, and the luma that its previous
  answer had over bicubic (16 sub-pixels). It warps both to the new frame.

`PixelShuffle` is the third stage, as for windows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from export.network.align import LEVELS, MULTIPLE, neighbor_residual
from export.network.flow import GRAY_WEIGHTS, LucasKanade, backward_warp, grayscale, upsample_flow
from export.network.frames import to_uint8
from export.network.generator import Generator
from export.network.layers import BicubicSubpixels, PixelShuffle, ResidualBlock, conv3x3, zeroed
from export.spec import CHANNELS, NEUTRAL, PHASES, SCALE

ALIGNED_CHANNELS = CHANNELS + 1 + PHASES
"""The new frame, RGB; the previous one warped to it, gray; what that adds to each sub-pixel."""
MISFIT = 0.05  # mean error of the warped lr frame, white = 1, up to which the state is believed
MAX_GATE = 0.95  # share of the previous answer's detail in the new one: the loop forgets
GATE_SLOPE = 8.0  # of the gate's logit over its convolution: weights of the usual size suffice
FIRST_GATE = 0.1  # before training: averaging so much of the past is a gain on validation clips already
FEATURE_RANGE = 1.0  # features beyond are clamped: 127 steps of a byte on either side of zero
BYTE_HALF = NEUTRAL - 1


@dataclass(frozen=True, kw_only=True)
class StreamWidths:
    """Channel counts of a recurrent network."""

    name: str
    body: int = 32
    """Channels that pass between the residual blocks."""
    inner: tuple[int, ...]
    """Inner channels of the residual blocks, one number for each."""
    features: int = 16
    """Channels of the body that the state keeps."""

    @property
    def state(self) -> int:
        """Bytes of the generator's state per lr pixel."""
        return self.features + PHASES


STREAM = StreamWidths(name="stream", inner=(32, 32, 32))
"""At most the work of the window network ``student``."""

STREAM_WIDTHS = {widths.name: widths for widths in (STREAM,)}


class State(NamedTuple):
    """What the generator keeps, in floating point."""

    features: Tensor
    """(N, F, H, W), -1..1."""
    detail: Tensor
    """(N, 16, H, W), -1/2..1/2, white = 1: luma of the answer's sub-pixels, less bicubic's."""


class Aligned(NamedTuple):
    """What is known of a frame before its state, in floating point."""

    flow: Tensor
    """(N, 2, H/2, W/2), to the previous frame, in pixels of its own resolution."""
    image: Tensor
    """(N, 20, H, W), 0..1, see ``ALIGNED_CHANNELS``."""


def round_through(x: Tensor, steps: float) -> Tensor:
    """``x`` rounded to multiples of 1 / ``steps``; gradients pass as if it were not."""
    return x + ((x * steps).round() / steps - x).detach()


class StreamAlign(nn.Module):
    """Lucas-Kanade flow to the previous frame, and the previous frame's samples around it."""

    def __init__(self) -> None:
        super().__init__()
        self.flow_estimator = LucasKanade(frames=2)

    def forward(self, lr_frame: Tensor, previous: Tensor, start: Tensor) -> tuple[Tensor, ...]:
        """Align one frame of each of N sequences.

        Args:
            lr_frame: (N, H, W, 3) uint8 RGB; H and W multiples of 4.
            previous: state, (N, h, w, 3) uint8: the frame before, scaled to H, W where it had another size.
                At a start it has any content and size, such as one pixel.
            start: (N, 1) float32: 1 where a sequence starts, else 0.

        Returns:
            flow: (N, 2, H/2, W/2) float32.
            aligned: (N, 20, H, W) uint8, see ``ALIGNED_CHANNELS``.
            start_rows: (N, h) float32, ``start`` for each row of the state, see ``spec.START_ROWS``.
            start_columns: (N, w) float32, likewise.
            state: (N, H, W, 3) uint8: ``lr_frame``.
        """
        frame = _image(lr_frame)
        gray = grayscale(frame)
        before = grayscale(_image(_enlarged(previous.permute(0, 3, 1, 2), gray).permute(0, 2, 3, 1)))
        before = torch.where(start.view(-1, 1, 1, 1) > 0, gray, before)
        flow, warped, samples = self._compare(gray, before)
        samples = (NEUTRAL + samples).round().to(torch.uint8)
        aligned = torch.cat((lr_frame.permute(0, 3, 1, 2), to_uint8(warped), samples), dim=1)
        rows, columns = (start.expand(-1, side) for side in previous.shape[1:3])
        return flow, aligned, rows, columns, lr_frame.clone()

    def align(self, frames: Tensor, before: Tensor) -> Aligned:
        """As ``forward``, from two (N, 3, H, W) float32 frames, 0..1; rounded alike."""
        flow, warped, samples = self._compare(grayscale(frames), grayscale(before))
        image = torch.cat((frames, (warped * 255).round() / 255, (NEUTRAL + samples).round() / 255), dim=1)
        return Aligned(flow, image)

    def _compare(self, gray: Tensor, before: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        flow = self._flow(torch.cat((gray, before), dim=1))
        full = upsample_flow(flow)
        return flow, backward_warp(before, full), neighbor_residual(gray, before, full)

    def _flow(self, pair: Tensor) -> Tensor:
        """(N, 2, H, W) gray frames, the new one and the one before -> (N, 2, H/2, W/2)."""
        height, width = pair.shape[-2:]
        below, right = ((side + MULTIPLE - 1) // MULTIPLE * MULTIPLE - side for side in (height, width))
        levels = [F.pad(pair, (0, right, 0, below), "replicate")]
        for _ in range(LEVELS - 1):
            levels.append(F.avg_pool2d(levels[-1], 2))
        levels = [self.flow_estimator.blur(level) for level in levels]
        flow = torch.zeros_like(F.avg_pool2d(levels[-1], 2))
        for index, level in enumerate(reversed(levels)):
            flow = self.flow_estimator(level[:, :1], level[:, 1:], upsample_flow(flow) if index else flow)
        return flow[:, :, : height // 2, : width // 2]


class StreamGenerator(nn.Module):
    """Residual blocks over the new frame and the warped state; answers are bicubic plus detail."""

    def __init__(self, widths: StreamWidths) -> None:
        super().__init__()
        self.widths = widths
        self.stem = conv3x3(ALIGNED_CHANNELS + PHASES, widths.body)
        self.fuse = nn.Conv2d(widths.body + widths.features, widths.body, 1)
        self.body = nn.Sequential(*(ResidualBlock(widths.body, inner) for inner in widths.inner))
        self.head = zeroed(conv3x3(widths.body, CHANNELS * PHASES))  # untrained: bicubic
        self.gate = zeroed(nn.Conv2d(widths.body, 1, 1))
        nn.init.constant_(_bias(self.gate), math.log(FIRST_GATE / (MAX_GATE - FIRST_GATE)) / GATE_SLOPE)
        self.skip = BicubicSubpixels(CHANNELS, SCALE)

    def forward(
        self, flow: Tensor, aligned: Tensor, start_rows: Tensor, start_columns: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Generate one hr frame of each of N sequences.

        Args:
            flow: (N, 2, H/2, W/2) float32, from `StreamAlign`.
            aligned: (N, 20, H, W) uint8, likewise.
            start_rows: (N, h) float32, likewise.
            start_columns: (N, w) float32, likewise.
            state: (N, 32, h, w) uint8, ``NEUTRAL`` = 0; any content and size at a start.

        Returns:
            subpixels: (N, 48, H, W) uint8.
            state: (N, 32, H, W) uint8.
        """
        start = start_rows[:, :1] * start_columns[:, :1]
        state = _enlarged(state, aligned).float() / 255 - NEUTRAL / 255
        features, detail = state.split((self.widths.features, PHASES), dim=1)
        old = State(features * (255 / BYTE_HALF), detail)
        answer, x, bicubic = self._generate(Aligned(flow, aligned.float() / 255), old, start)
        subpixels = to_uint8(answer)
        features, detail = self._state(x, subpixels.float() / 255, bicubic)
        centered = torch.cat((BYTE_HALF * features, 255 * detail), dim=1)
        return subpixels, (NEUTRAL + centered).round().to(torch.uint8)

    def start(self, n: int, like: Tensor) -> State:
        """The state before a first frame, in the size of an image."""
        side = like.shape[-2:]
        return State(like.new_zeros(n, self.widths.features, *side), like.new_zeros(n, PHASES, *side))

    def step(self, aligned: Aligned, state: State, start: Tensor) -> tuple[Tensor, State]:
        """As ``forward``, in floating point: gradients pass through the rounding of answer and state.

        Returns:
            (N, 48, H, W) sub-pixels, neither clamped nor rounded, and the state.
        """
        answer, x, bicubic = self._generate(aligned, state, start)
        served = answer + (answer.clamp(0, 1).mul(255).round() / 255 - answer).detach()
        features, detail = self._state(x, served, bicubic)
        return answer, State(round_through(features, BYTE_HALF), round_through(detail, 255))

    def _generate(self, aligned: Aligned, state: State, start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sub-pixels, neither clamped nor rounded, the body's features, and bicubic's sub-pixels."""
        frame, warped = aligned.image[:, :CHANNELS], aligned.image[:, CHANNELS : CHANNELS + 1]
        flow = upsample_flow(aligned.flow)
        hr_flow = SCALE * F.interpolate(flow, scale_factor=float(SCALE), mode="bilinear", align_corners=False)
        fits = self._fits(frame, warped) * (1 - start.view(-1, 1, 1, 1))
        features = fits * backward_warp(state.features, flow)
        hr_detail = backward_warp(F.pixel_shuffle(state.detail, SCALE), hr_flow)
        detail = fits * F.pixel_unshuffle(hr_detail, SCALE)

        local = F.relu(self.stem(torch.cat((aligned.image - NEUTRAL / 255, detail), dim=1)))
        x = self.body(F.relu(self.fuse(torch.cat((local, features), dim=1))))
        residual = self.head(x)
        # As in a Kalman filter: a share of what the previous answer knew in place of what this frame tells.
        gate = MAX_GATE * fits * torch.sigmoid(GATE_SLOPE * self.gate(x))
        known = gate * (detail - self._gray(residual))
        residual = residual.unflatten(1, (CHANNELS, PHASES)) + known.unsqueeze(1)
        bicubic = self.skip(frame)
        return residual.flatten(1, 2) + bicubic, x, bicubic

    def _state(self, x: Tensor, served: Tensor, bicubic: Tensor) -> State:
        """The state after an answer as served, not rounded."""
        features = (x[:, : self.widths.features] / FEATURE_RANGE).clamp(-1, 1)
        detail = self._gray(served - bicubic)
        return State(features, detail.clamp(-BYTE_HALF / 255, BYTE_HALF / 255))

    @staticmethod
    def _gray(subpixels: Tensor) -> Tensor:
        """(N, 48, H, W) -> (N, 16, H, W)."""
        red, green, blue = subpixels.split(PHASES, dim=1)
        return GRAY_WEIGHTS[0] * red + GRAY_WEIGHTS[1] * green + GRAY_WEIGHTS[2] * blue

    @staticmethod
    def _fits(frame: Tensor, warped: Tensor) -> Tensor:
        """(N, 1, H, W), 0..1: where the previous lr frame, warped, agrees with the new one."""
        error = F.avg_pool2d(
            (warped - grayscale(frame)).abs(), 3, stride=1, padding=1, count_include_pad=False
        )
        return (2 - error / MISFIT).clamp(0, 1)


class StreamNetwork(nn.Module):
    """The three stages in a row; attribute names are the served models'."""

    def __init__(self, widths: StreamWidths) -> None:
        super().__init__()
        self.widths = widths
        self.stream_align = StreamAlign()
        self.stream_generator = StreamGenerator(widths)
        self.pixel_shuffle = PixelShuffle()

    def forward(self, lr_frame: Tensor, previous: Tensor, state: Tensor, start: Tensor) -> tuple[Tensor, ...]:
        """One frame of each of N sequences, as served: hr frame and both states; see the stages."""
        flow, aligned, rows, columns, previous = self.stream_align(lr_frame, previous, start)
        subpixels, state = self.stream_generator(flow, aligned, rows, columns, state)
        return self.pixel_shuffle(subpixels), previous, state

    def first_state(self, n: int) -> tuple[Tensor, Tensor]:
        """States to hand in with a first frame: one pixel, of any content."""
        return (
            torch.zeros(n, 1, 1, CHANNELS, dtype=torch.uint8),
            torch.zeros(n, self.widths.state, 1, 1, dtype=torch.uint8),
        )

    @torch.inference_mode()
    def upscale(self, lr_frames: Iterable[Tensor]) -> Iterable[Tensor]:
        """(H, W, 3) uint8 frames of one sequence -> (4H, 4W, 3) uint8, one by one."""
        previous, state = self.first_state(1)
        start = torch.ones(1, 1)
        for frame in lr_frames:
            hr, previous, state = self(frame[None], previous, state, start)
            start = torch.zeros(1, 1)
            yield hr[0]


def count_stream(widths: StreamWidths, lr_size: tuple[int, int] = (720, 1280)) -> tuple[int, float]:
    """Parameters, and floating-point operations per frame (2 x MAC, convolutions) at ``lr_size``."""
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        network = StreamNetwork(widths)
        frame = torch.zeros(1, *lr_size, CHANNELS, dtype=torch.uint8)
        state = torch.zeros(1, widths.state, *lr_size, dtype=torch.uint8)
        network(frame, frame, state, torch.zeros(1, 1))
    return sum(p.numel() for p in network.parameters()), float(counter.get_total_flops())


@torch.no_grad()
def from_window_network(generator: Generator, widths: StreamWidths) -> StreamNetwork:
    """A recurrent network that starts a sequence as a window network answers three times the same frame.

    The next frame of the window, which a stream does not know yet, counts as equal to the new one. What the
    state adds has weights of zero. Of blocks that ``widths`` narrows, the weakest inner channels go.
    """
    network = StreamNetwork(widths)
    mine, body = network.stream_generator, widths.body
    kernel = generator.stem.weight
    rgb, before, after, samples, _ = kernel.split((CHANNELS, 1, 1, PHASES, PHASES), dim=1)
    rgb = rgb + after * torch.tensor(GRAY_WEIGHTS).view(1, CHANNELS, 1, 1)
    mine.stem.weight.zero_()
    mine.stem.weight[:, :ALIGNED_CHANNELS] = torch.cat((rgb, before, samples), dim=1)
    _bias(mine.stem).copy_(_bias(generator.stem))
    mine.fuse.weight.zero_()
    mine.fuse.weight[:, :body] = generator.fuse.weight
    _bias(mine.fuse).copy_(_bias(generator.fuse))
    for block, wider in zip(mine.body, generator.body, strict=True):
        _narrow(cast(ResidualBlock, block), cast(ResidualBlock, wider))
    mine.head.load_state_dict(generator.head.state_dict())
    return network


def _narrow(block: ResidualBlock, wider: ResidualBlock) -> None:
    """Copy the inner channels with the largest weights."""
    first, second = wider.conv1.weight, wider.conv2.weight
    size = first.flatten(1).norm(dim=1) * second.transpose(0, 1).flatten(1).norm(dim=1)
    kept = size.topk(block.conv1.out_channels).indices.sort().values
    block.conv1.weight.copy_(first[kept])
    block.conv2.weight.copy_(second[:, kept])
    _bias(block.conv1).copy_(_bias(wider.conv1)[kept])
    _bias(block.conv2).copy_(_bias(wider.conv2))


def _bias(convolution: nn.Conv2d) -> Tensor:
    return cast(Tensor, convolution.bias)


def _image(frame: Tensor) -> Tensor:
    return frame.permute(0, 3, 1, 2).float() / 255


def _enlarged(state: Tensor, like: Tensor) -> Tensor:
    """(N, C, h, w) in the size of an image: a state has its own size where a sequence starts."""
    return F.interpolate(state, size=like.shape[-2:], mode="nearest")
