"""Frames of one clip from the file to hr frames: decode and inference side by side, bounded in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction

from .frames.scenes import CutDetector
from .frames.windows import Image, Size, pad
from .memory import Plan
from .prefetch import Prefetch, Stage
from .record import Record
from .serving.contract import Contract
from .serving.session import Session
from .serving.trail import BATCH
from .serving.transports import AUTO
from .shard import Shard
from .stages import reading, stage
from .upscaler import Layout, Place, hr_from_frames
from .video.decode import Video
from .video.deinterlace import OFF
from .video.encode import Encoding
from .video.picture import Frame, Picture, Range
from .video.streams import EVERY_STREAM, Selection

LARGEST_ASPECT_TERM = 255  # of a pixel's width and height; all encoders can write it


@dataclass(frozen=True)
class Options:
    """What a user decides about a run."""

    encoding: Encoding
    segment_frames: int
    """Frames of one segment, the unit in which work is kept."""
    scene_threshold: float
    """How different two frames are, in gray levels, that belong to different shots."""
    range: Range
    """The part of the clip to upscale."""
    final_size: Size | None = None
    """(height, width) of the output, if not that of the model."""
    memory: int | None = None
    """Bytes for all frames under way, and the encoder; None: a part of what this process may use."""
    priority: str = BATCH
    """Whose frames go first at servers that are shared, one of ``trail.PRIORITIES``."""
    transport: str = AUTO
    """How frames pass to the server, one of ``transports.TRANSPORTS``."""
    restart: bool = False
    """Begin anew even if an earlier run can be continued."""
    allow_damage: bool = False
    """Make do with the frames there are if some of the clip cannot be read."""
    allow_hdr: bool = False
    """Treat PQ and HLG like any other transfer."""
    selection: Selection = EVERY_STREAM
    """Which of the source's streams are wanted."""
    deinterlace: str = OFF
    """Which frames are deinterlaced, one of ``deinterlace.DEINTERLACE``."""
    square_pixels: bool = False
    """Stretch the output so that its pixels are square."""
    shard: Shard | None = None
    """The part to upscale of the clip, or of its range, where many machines share it."""
    keep_existing: bool = False
    """Skip an output that another run finishes before this one begins."""


@dataclass(frozen=True)
class Result:
    """What a finished run did."""

    frames: int
    new_frames: int
    """Frames that no earlier run had finished."""
    cuts_s: list[float]
    """Times of the scene cuts, at which windows end, from the first frame on."""
    damaged_frames: int
    """Frames that the decoder could not restore wholly."""
    lr_size: Size
    hr_size: Size
    elapsed_s: float
    stages_s: dict[str, float]
    """Seconds at work by stage; the longest is the bottleneck."""

    @property
    def fps(self) -> float:
        """Frames per second of this run, from file to file."""
        return self.new_frames / self.elapsed_s


@dataclass(frozen=True)
class Shapes:
    """The sizes of a run, from the frame that is decoded to the one that is encoded."""

    lr: Picture
    layout: Layout
    """How the frames pass through the model."""
    hr: Picture
    """What is encoded."""


def shapes_of(
    lr: Picture, contract: Contract, final_size: Size | None, square_pixels: bool = False
) -> Shapes:
    """Work out the sizes of a run."""
    layout = Layout.of(lr.size, contract)
    return Shapes(lr, layout, hr_picture(lr, contract.scale, final_size, square_pixels))


def hr_picture(lr: Picture, scale: int, final_size: Size | None, square_pixels: bool) -> Picture:
    """What is encoded for a clip, from a model that enlarges by ``scale``."""
    of_model = lr.size[0] * scale, lr.size[1] * scale
    size = final_size or of_model
    if square_pixels and lr.sample_aspect_ratio:
        size = square_size(of_model, lr.sample_aspect_ratio)
    matrix = lr.display_matrix
    if matrix:  # its last row shifts the picture, in pixels
        shift_x, shift_y = matrix[6] * size[1] // lr.size[1], matrix[7] * size[0] // lr.size[0]
        matrix = (*matrix[:6], shift_x, shift_y, matrix[8])
    stretch = Fraction(lr.size[1] * size[0], lr.size[0] * size[1])
    aspect = lr.sample_aspect_ratio
    if square_pixels:
        aspect = None
    elif stretch != 1:  # pixels change their shape so that the picture keeps its own
        aspect = ((aspect or 1) * stretch).limit_denominator(LARGEST_ASPECT_TERM)
    return replace(lr, size=size, display_matrix=matrix, sample_aspect_ratio=aspect)


def square_size(size: Size, aspect: Fraction) -> Size:
    """The (height, width) with square pixels of a picture whose pixels are ``aspect`` times as wide as high.

    The shorter side of its pixels is stretched, so nothing is lost; both sides stay even where they are.
    """
    height, width = size
    if aspect > 1:
        return height, round(width * aspect / 2) * 2
    return round(height / aspect / 2) * 2, width


class Pipeline:
    """A clip on its way from the file to hr frames; iterate once, then read what it has seen.

    Args:
        video: The clip.
        session: Where windows are sent.
        shapes: Sizes of the run.
        options: How it is done.
        known: Frames at the beginning that an earlier run has finished.
        plan: How many frames each queue may hold.
        part: First frame of the range, and the one after the last; None: to its end.
    """

    def __init__(
        self,
        video: Video,
        session: Session,
        shapes: Shapes,
        options: Options,
        known: Record,
        plan: Plan,
        part: tuple[int, int | None] = (0, None),
    ) -> None:
        # The first that a new window needs; one at least, to compare with what is known.
        reach = max(1, session.contract.reach)
        again = max(0, len(known.pts) - reach)
        self._first, end = part
        self._lead = 0 if again else min(reach, self._first)  # frames before the part that windows look at
        self._most = None if end is None else end - self._first
        self.record = known.part(0, again)
        """The frames decoded so far."""
        if again:  # later ones are found anew
            self.record.cuts = [cut for cut in known.cuts if cut <= known.pts[again]]
        self.decode, self.starve, self.pass_on, self.wait = Stage(), Stage(), Stage(), Stage()
        self._video, self._session, self._shapes = video, session, shapes
        self._frames = Prefetch(self.decode.timed(self._lr_frames(options.range, known)), plan.lr_frames)
        frames = self.starve.timed(self._frames)
        start = self._lead + len(known.pts) - again
        stop = None if self._most is None else start + self._most - len(known.pts)
        place = Place(start, stop, self._first + again - self._lead, options.segment_frames)
        is_cut = CutDetector(options.scene_threshold, self.record.cuts)
        self._answers = Prefetch(self.pass_on.timed(self._hr_frames(frames, is_cut, place)), plan.hr_frames)

    def _lr_frames(self, wanted: Range, known: Record) -> Iterator[Frame]:
        record, lead = self.record, self._lead
        with reading(self._video.path):
            for frame in self._video.frames(wanted, known, len(record.pts), self._first, lead):
                if lead:
                    lead -= 1
                elif self._most is None or len(record.pts) < self._most:  # not those that windows look at
                    if len(record.pts) < len(known.pts):
                        known.check(len(record.pts), frame.pts, frame.image, self._video.path)
                    record.add(frame.pts, frame.image, self._video.damaged, self._video.refused)
                yield replace(frame, image=pad(frame.image, self._shapes.layout.padded))

    def _hr_frames(self, frames: Iterator[Frame], is_cut: CutDetector, place: Place) -> Iterator[Image]:
        with stage("cannot send frames to the server", "see its log"):
            yield from hr_from_frames(frames, self._session, self._shapes.layout, is_cut, place)

    def __iter__(self) -> Iterator[Image]:
        """Yield (H * scale, W * scale, 3) uint8 RGB frames in order."""
        return self.wait.timed(self._answers)

    def close(self) -> None:
        """End the threads."""
        self._session.stop()  # or the second would go on waiting for a slow server
        self._frames.close()
        self._answers.close()
