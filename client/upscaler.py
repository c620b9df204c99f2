"""The library: frames in, frames four times as large out, as numpy arrays.

The command line uses ``Layout``, ``plan_for`` and ``hr_from_frames`` of this module for its own frames.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from types import TracebackType

import numpy as np

from .errors import FrameError
from .frames.scenes import DEFAULT_THRESHOLD, CutDetector
from .frames.sequences import MOST_FRAMES, FrameSequence, sequence_length, sequences
from .frames.tiles import Grid, grid_for
from .frames.windows import Image, Size, crop, fitted_size, pad, windows
from .memory import NO_ENCODER, Plan, default_budget, plan_queues
from .serving.addresses import DEFAULT_URL
from .serving.contract import Contract
from .serving.opening import DEFAULT_MODEL, DEFAULT_PATIENCE_S, open_session
from .serving.security import Security
from .serving.server import NO_SECURITY
from .serving.session import Session
from .serving.transports import AUTO
from .video.picture import Frame

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Layout:
    """How frames of one size pass through a model; all sizes are (height, width)."""

    lr: Size
    padded: Size
    """What the model takes: sides rounded up to its multiple, and at least its minimum."""
    grid: Grid
    """Tiles, one if the model takes a whole frame."""
    hr: Size

    @classmethod
    def of(cls, lr: Size, contract: Contract) -> Layout:
        """Work out the layout for frames of a size."""
        padded = fitted_size(lr, contract.multiple_of, contract.min_size)
        grid = grid_for(padded, contract.max_size, contract.multiple_of)
        return cls(lr, padded, grid, (lr[0] * contract.scale, lr[1] * contract.scale))

    def sequence_length(self, contract: Contract, segment_frames: int) -> int:
        """Frames of a sequence whose answers are wanted."""
        return sequence_length(3 * math.prod(self.grid.tile) * contract.scale**2, segment_frames)


@dataclass(frozen=True)
class Place:
    """Which frames of those at hand are wanted, and where they lie in the clip."""

    start: int = 0
    """Index of the first frame to be answered; those before are looked at."""
    stop: int | None = None
    """Index of the one after the last."""
    first: int = 0
    """Number in the clip's range of the first frame at hand."""
    segment_frames: int = MOST_FRAMES
    """Sequences begin anew with every segment, so that a run that is resumed with one cuts alike."""

    def begins(self, length: int) -> Callable[[int], bool]:
        """Whether a sequence of this length begins at a frame at hand."""
        return lambda index: (self.first + index) % self.segment_frames % length == 0


WHOLE = Place()


def hr_from_frames(
    frames: Iterable[Frame],
    session: Session,
    layout: Layout,
    is_cut: CutDetector,
    place: Place = WHOLE,
) -> Iterator[Image]:
    """Upscale padded frames, in windows or in sequences, as the model takes them.

    Args:
        frames: Of size ``layout.padded``; read only as far ahead as requests are in flight.
        session: Where they are sent.
        layout: Of these frames.
        is_cut: Where neither windows nor sequences look over.
        place: Which of these frames are wanted, and where they lie in the clip.

    Yields:
        (H * scale, W * scale, 3) uint8 RGB of size ``layout.hr``, in order.

    Raises:
        UpscaleError: A server refused a window, or no server is left.
    """
    contract, grid = session.contract, layout.grid
    if contract.warmup is None:
        shots = islice(windows(frames, contract.window, is_cut), place.start, place.stop)
        stacks = (np.stack([frame.image for frame in window]) for window in shots)
        answers = session.hr_frames(tile for stack in stacks for tile in grid.split(stack))
        while parts := list(islice(answers, grid.count)):
            yield crop(grid.merge(parts, contract.scale), layout.hr)
        return
    length = layout.sequence_length(contract, place.segment_frames)
    begins = place.begins(length)
    pieces = sequences(frames, begins, contract.warmup, is_cut, place.start, place.stop)
    work = (
        FrameSequence(tile, skip)
        for piece, skip in pieces
        for tile in grid.split(np.stack([frame.image for frame in piece]))
    )
    answers = session.hr_frames(work)
    while parts := list(islice(answers, grid.count)):
        for tiles in zip(*parts, strict=True):
            yield crop(grid.merge(list(tiles), contract.scale), layout.hr)


def plan_for(
    session: Session,
    layout: Layout,
    memory: int | None,
    encoder: str = NO_ENCODER,
    segment_frames: int = MOST_FRAMES,
) -> Plan:
    """Share memory out over the queues of frames, and hold the session to its part.

    Args:
        session: Where frames are sent; what they share memory with comes after this.
        layout: Of the frames.
        memory: Bytes; None: a part of what this process may use.
        encoder: FFmpeg's name of what takes the frames that come out.
        segment_frames: See ``Place``.

    Returns:
        The plan; a budget that is too small for it is said.
    """
    budget = memory or default_budget()
    contract = session.contract
    answers = 1 if contract.warmup is None else layout.sequence_length(contract, segment_frames)
    frames = contract.window if contract.warmup is None else answers + contract.warmup
    plan = plan_queues(
        budget, layout.padded, layout.grid, frames, contract.scale, session.in_flight, encoder, answers
    )
    if plan.bytes > budget:
        log.warning(
            "frames of this size take about %.1f GB, %.1f GB are to be used: one at a time is under way, "
            "see %s",
            *(plan.bytes / 1e9, budget / 1e9, "memory=" if encoder == NO_ENCODER else "--memory"),
        )
    session.limit(plan.windows)
    return plan


class Upscaler:
    """A connection to one or many Triton servers that upscale frames; use it as a context manager.

    Args:
        urls: gRPC address such as ``localhost:8001``, or several that share the work;
            ``grpcs://host:port`` speaks TLS.
        model: Name of the ensemble. ``mst_gan_stream``, where it is served, sees all frames before one, but
            reads some hundred frames ahead of what comes out.
        security: Certificates and token for ``grpcs://`` addresses.
        patience_s: Seconds to wait for lost servers before giving up.
        transport: ``auto``, ``cuda``, ``system`` (shared memory) or ``grpc``.
        scene_threshold: Mean difference of two frames, in gray levels, that is a scene cut; windows end
            there.
        memory: Bytes for all frames under way, shared memory among them; None: a quarter of the machine's
            memory, or of what the control group is given.

    Raises:
        ServerError: A server does not answer.
        UpscaleError: It serves something else, or ``urls`` is no address.
    """

    def __init__(
        self,
        urls: str | Iterable[str] = DEFAULT_URL,
        *,
        model: str = DEFAULT_MODEL,
        security: Security = NO_SECURITY,
        patience_s: float = DEFAULT_PATIENCE_S,
        transport: str = AUTO,
        scene_threshold: float = DEFAULT_THRESHOLD,
        memory: int | None = None,
    ) -> None:
        self._stack = ExitStack()
        addresses = [urls] if isinstance(urls, str) else urls
        self._session = self._stack.enter_context(open_session(addresses, model, security, patience_s))
        self._transport, self._scene_threshold, self._memory = transport, scene_threshold, memory

    @property
    def scale(self) -> int:
        """Output side / input side."""
        return self._session.contract.scale

    def upscale(
        self, frames: Iterable[Image], progress: Callable[[int], None] | None = None
    ) -> Iterator[Image]:
        """Upscale consecutive frames of one clip.

        Args:
            frames: (H, W, 3) uint8 RGB, 0..255, all of one size; read lazily, a few windows ahead.
            progress: Called with the number of frames done so far, after each.

        Yields:
            One (H * scale, W * scale, 3) uint8 RGB frame per frame, in order.

        Raises:
            FrameError: A frame has another shape or dtype; also a ValueError.
            ServerError: No server is left; also a ConnectionError.
            UpscaleError: A server refused a window.
        """
        frames = iter(frames)
        first = next(frames, None)
        if first is None:
            return
        layout = Layout.of(_checked(first, None), self._session.contract)
        plan_for(self._session, layout, self._memory)
        self._session.share_memory((self._session.contract.window, *layout.grid.tile, 3), self._transport)

        def padded() -> Iterator[Frame]:
            yield Frame(pad(first, layout.padded), 0)
            for number, frame in enumerate(frames, start=1):
                _checked(frame, layout.lr)
                yield Frame(pad(frame, layout.padded), number)

        is_cut = CutDetector(self._scene_threshold)
        for done, hr in enumerate(hr_from_frames(padded(), self._session, layout, is_cut), start=1):
            if progress:
                progress(done)
            yield hr

    def close(self) -> None:
        """Hang up, and let go of shared memory."""
        self._stack.close()

    def __enter__(self) -> Upscaler:
        """Return the open connection."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()


def _checked(frame: Image, size: Size | None) -> Size:
    """Return a frame's size; raise FrameError if it is no RGB frame, or not of ``size``."""
    shape = tuple(getattr(frame, "shape", ()))
    dtype = getattr(frame, "dtype", type(frame).__name__)
    is_rgb = dtype == np.uint8 and len(shape) == 3 and shape[2] == 3 and min(shape) > 0
    if not is_rgb or (size is not None and shape[:2] != size):
        expected = (*size, 3) if size else "(H, W, 3)"
        raise FrameError(
            f"expected frames of shape {expected} and dtype uint8, found {shape} {dtype}: "
            "convert them to RGB of one size"
        )
    return int(shape[0]), int(shape[1])
