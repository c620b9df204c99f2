"""The run of one clip: decode, inference and encode side by side, resumable, bounded in memory."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Protocol

import numpy as np

from .errors import UpscaleError
from .frames.scenes import CutDetector
from .frames.tiles import Grid
from .frames.windows import Image, Size, pad, windows
from .prefetch import Prefetch, Stage
from .record import InputGuard, Record
from .resume import ResumeState
from .serving.contract import Contract
from .serving.session import Session
from .serving.transports import AUTO
from .stages import stage
from .upscaler import Layout, hr_from_windows
from .video.decode import Frame, Picture, Range, Video
from .video.deinterlace import OFF
from .video.encode import PNG, Encoding, write_segment, write_y4m
from .video.images import Images, writes_images
from .video.mux import Muxer
from .video.source import PIPE, Source
from .video.streams import EVERY_STREAM, Selection
from .video.times import Times

FRAMES_AHEAD = 4  # decoded, or waiting for the encoder: enough to even out the stages' pace
BYTES_AHEAD = 512 << 20  # of them at most: an hr frame of an 8K clip has 1.6 GB

REHEARSED_FRAMES = 3  # enough for an encoder to reorder them
LARGEST_ASPECT_TERM = 255  # of a pixel's width and height; all encoders can write it

log = logging.getLogger(__name__)


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
    transport: str = AUTO
    """How frames pass to the server, one of ``ladder.TRANSPORTS``."""
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


class Watcher(Protocol):
    """Who wants to know how a run goes."""

    def started(self, dst: Path, total: int, done: int) -> None:
        """Frames are about to pass: so many expected, 0 if unknown; so many finished earlier."""

    def advanced(self) -> None:
        """One more frame is written."""


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
    size = final_size or layout.hr
    if square_pixels and lr.sample_aspect_ratio:
        size = square_size(layout.hr, lr.sample_aspect_ratio)
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
    hr = replace(lr, size=size, display_matrix=matrix, sample_aspect_ratio=aspect)
    return Shapes(lr, layout, hr)


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
    """

    def __init__(
        self, video: Video, session: Session, shapes: Shapes, options: Options, known: Record
    ) -> None:
        again = max(0, len(known.pts) - session.contract.window // 2)  # the first that a new window needs
        self.record = known.part(0, again)
        """The frames decoded so far."""
        self.record.cuts = [cut for cut in known.cuts if cut <= known.pts[again]]  # later ones are found anew
        self.decode, self.starve, self.pass_on, self.wait = Stage(), Stage(), Stage(), Stage()
        self._video, self._session, self._shapes = video, session, shapes
        self._frames = Prefetch(self.decode.timed(self._lr_frames(options.range, known)), FRAMES_AHEAD)
        frames = self.starve.timed(self._frames)
        is_cut = CutDetector(options.scene_threshold, self.record.cuts)
        shots = islice(windows(frames, session.contract.window, is_cut), len(known.pts) - again, None)
        lr_windows = ([frame.image for frame in window] for window in shots)
        hr_bytes = 3 * math.prod(shapes.layout.hr)
        depth = min(FRAMES_AHEAD, max(1, BYTES_AHEAD // hr_bytes))
        self._answers = Prefetch(self.pass_on.timed(self._hr_frames(lr_windows)), depth)

    def _lr_frames(self, wanted: Range, known: Record) -> Iterator[Frame]:
        record = self.record
        with reading(self._video.path):
            for frame in islice(self._video.frames(wanted), len(record.pts), None):
                if len(record.pts) < len(known.pts):
                    known.check(len(record.pts), frame.pts, frame.image, self._video.path)
                record.add(frame.pts, frame.image, self._video.damaged)
                yield replace(frame, image=pad(frame.image, self._shapes.layout.padded))

    def _hr_frames(self, lr_windows: Iterator[list[Image]]) -> Iterator[Image]:
        with stage("cannot send frames to the server", "see its log"):
            yield from hr_from_windows(lr_windows, self._session, self._shapes.layout)

    def __iter__(self) -> Iterator[Image]:
        """Yield (H * scale, W * scale, 3) uint8 RGB frames in order."""
        return self.wait.timed(self._answers)

    def close(self) -> None:
        """End the threads."""
        self._session.stop()  # or the second would go on waiting for a slow server
        self._frames.close()
        self._answers.close()


def upscale(
    source: Source,
    dst: Path,
    session: Session,
    options: Options,
    watcher: Watcher,
) -> Result:
    """Upscale one video file.

    Args:
        source: The video, or the images.
        dst: The file to make; all or nothing, unfinished work stays in ``DST.part/``.
        session: Where windows are sent.
        options: How it is done.
        watcher: Told how it goes.

    Raises:
        UpscaleError: The clip could not be upscaled, all of it and exactly.
    """
    with reading(source.path):
        guard = InputGuard(source)
        video = Video(source, options.selection, options.deinterlace)
    with video:
        kind = "PQ or HLG" if video.picture.color.is_hdr else "Dolby Vision" if video.is_dolby_vision else ""
        if kind and not options.allow_hdr:
            raise UpscaleError(
                f"expected a clip of standard dynamic range, found {kind} in {source.path}: the model "
                "works in 8 bits and knows no HDR; convert the clip first, or pass --allow-hdr to try"
            )
        if (
            dst.suffix
            and writes_images(dst, source)
            and options.range.frames != 1
            and video.has_many_frames()
        ):
            raise UpscaleError(
                f"expected one frame for {dst.name}, found more in {source.path}: name the output .mp4 or "
                ".mkv, or pass --max-frames 1"
            )
        run = Run(video, session, options, watcher)
        if dst == PIPE:
            run.stream(dst)
        else:
            run.make(source, dst, guard)
    return run.result()


class Run:
    """One clip on its way to an output.

    Args:
        video: The clip.
        session: Where windows are sent.
        options: How it is done.
        watcher: Told how it goes.
    """

    def __init__(self, video: Video, session: Session, options: Options, watcher: Watcher) -> None:
        self._began_s = time.monotonic()
        self._video, self._session, self._options, self._watcher = video, session, options, watcher
        self._shapes = shapes_of(video.picture, session.contract, options.final_size, options.square_pixels)
        self._new_frames = 0
        self._encode_s = 0.0

    def make(self, source: Source, dst: Path, guard: InputGuard) -> None:
        """Write a file or a folder of images, in segments that outlive a crash."""
        is_images = writes_images(dst, source)
        options = replace(self._options, encoding=PNG) if is_images else self._options
        identity = identity_of(guard.identity, self._session.contract, options)
        with (
            stage(f"cannot write {dst}"),
            ResumeState(dst, identity, self._session.weights(), options.restart) as part,
        ):
            join = (
                Images(part.joined, source)
                if is_images
                else Muxer(part.joined, source, self._shapes.hr, options.selection)
            )
            if not part.segments():
                rehearse(part.folder / "rehearsal.segment", join, self._shapes.hr, options.encoding)
            known = part.record()
            hr_frames = self._start(dst, known)
            try:
                self._write_segments(part, hr_frames, options.encoding, guard)
                self._check_all_came()
                times = Times(self._shapes.lr.time_base, self._feed.record.pts, self._video.last_duration)
                with stage("cannot write it"):
                    guard.check(closely=True)
                    join.write(part.segments(), times, is_whole=options.range == Range())
                    guard.check()
                    part.finish()
            except UpscaleError as err:
                kept = len(part.record().pts)
                state = f"{kept} frames are kept in {part.folder}, the same command goes on from there"
                raise self._stopped(err, state) from err
            finally:
                self._feed.close()

    def _write_segments(
        self, part: ResumeState, hr_frames: Iterator[Image], encoding: Encoding, guard: InputGuard
    ) -> None:
        """Encode all frames that come."""
        end = self._finished
        for index, first in enumerate(hr_frames, len(part.segments())):
            path = part.segment(index)
            images = chain([first], islice(hr_frames, self._options.segment_frames - 1))
            with encoding_stage():
                count = write_segment(path, images, self._shapes.hr, encoding)
                guard.check()
                part.keep(path, self._feed.record.part(end, end + count))
            end += count

    def stream(self, dst: Path) -> None:
        """Write y4m to standard output."""
        hr_frames = self._start(dst, Record())
        try:
            with encoding_stage():
                write_y4m(hr_frames, self._shapes.hr, self._options.encoding.pix_fmt)
            self._check_all_came()
            if len({after - before for before, after in pairwise(self._feed.record.pts)}) > 1:
                log.warning("the frames of %s are not evenly spaced, which y4m cannot say", self._video.path)
        except UpscaleError as err:
            raise self._stopped(err, "what came before is written") from err
        finally:
            self._feed.close()

    def _start(self, dst: Path, known: Record) -> Iterator[Image]:
        """Set the stages going; yields hr frames from the first that is not finished."""
        self._started_s = time.monotonic()
        self._finished = len(known.pts)
        _say_how(self._session, self._shapes.layout.grid, self._options)
        self._watcher.started(dst, self._video.frames_expected(self._options.range), self._finished)
        self._feed = Pipeline(self._video, self._session, self._shapes, self._options, known)
        return self._counted(self._feed)

    def _counted(self, feed: Pipeline) -> Iterator[Image]:
        for image in feed:
            yield image
            self._new_frames += 1
            self._watcher.advanced()

    def _check_all_came(self) -> None:
        self._encode_s = time.monotonic() - self._started_s - self._feed.wait.busy_s
        missing = self._video.what_is_missing()
        if missing and not self._options.allow_damage:
            raise UpscaleError(f"the file {missing}: get it whole, or pass --allow-damage")
        expected = max(0, len(self._feed.record.pts) - self._finished)
        if self._new_frames != expected:
            raise UpscaleError(f"expected {expected} frames back, found {self._new_frames}")

    def _stopped(self, err: UpscaleError, state: str) -> UpscaleError:
        """Say how far it came."""
        after = self._finished + self._new_frames
        if not after:
            return err
        return UpscaleError(f"stopped after frame {after} of {self._video.path}: {err}; {state}")

    def result(self) -> Result:
        """What was done."""
        feed, shapes = self._feed, self._shapes
        pts = feed.record.pts
        return Result(
            frames=len(pts),
            new_frames=self._new_frames,
            cuts_s=[float((cut - pts[0]) * shapes.lr.time_base) for cut in feed.record.cuts],
            damaged_frames=self._video.damaged,
            lr_size=shapes.lr.size,
            hr_size=shapes.hr.size,
            elapsed_s=time.monotonic() - self._began_s,
            stages_s={
                "decode": feed.decode.busy_s,
                "transfer": feed.pass_on.busy_s - feed.starve.busy_s - self._session.wait_s,
                "inference": self._session.wait_s,
                "encode": self._encode_s,
            },
        )


def reading(path: Path) -> AbstractContextManager[None]:
    """The stage that reads a clip."""
    return stage(f"cannot read {path}", "check that it plays")


@contextmanager
def encoding_stage(what_fails: str = "cannot encode it") -> Iterator[None]:
    """The stage that encodes frames and writes them: what the system refuses is not the encoder's fault."""
    with (
        stage(what_fails, "change --codec, --preset, --crf, --pix-fmt or --final-size"),
        stage("cannot write it", kinds=(OSError,)),
    ):
        yield


def identity_of(input_identity: str, contract: Contract, options: Options) -> dict[str, object]:
    """All that decides what the frames of a run look like; JSON-able."""
    encoding = options.encoding
    return {
        "input": input_identity,
        "model": contract.model,
        "model parameters": dict(contract.parameters),
        "encoding": [encoding.codec.encoder, encoding.pix_fmt, *map(list, encoding.options)],
        "final size": list(options.final_size or ()),
        "range": {name: str(value) for name, value in asdict(options.range).items()},
        "deinterlacing": options.deinterlace,
        "square pixels": options.square_pixels,
        "scene threshold": options.scene_threshold,
        "segment length": options.segment_frames,
    }


def _say_how(session: Session, grid: Grid, options: Options) -> None:
    """Agree with the servers on how frames pass, and tell the user."""
    lr_shape = (session.contract.window, *grid.tile, 3)
    log.info("frames pass through %s", session.share_memory(lr_shape, options.transport))
    if grid.count > 1:
        log.info("every frame in %d tiles of %dx%d", grid.count, grid.tile[1], grid.tile[0])


def rehearse(segment: Path, join: Muxer | Images, picture: Picture, encoding: Encoding) -> None:
    """Encode and join a few black frames, so that what cannot be written is known before the work."""
    height, width = picture.size
    settings = " ".join(f"{name}={value}" for name, value in encoding.options)
    with encoding_stage(f"{encoding.codec.encoder} refused {width}x{height} {encoding.pix_fmt} {settings}"):
        black = np.zeros((height, width, 3), np.uint8)
        write_segment(segment, [black] * REHEARSED_FRAMES, picture, encoding)
    join.rehearse(segment)
    segment.unlink()
