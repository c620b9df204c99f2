"""The run of one clip: its segments, what is left when it ends early, and the join."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Protocol

import numpy as np

from .errors import HeldError, UpscaleError
from .frames.tiles import Grid
from .frames.windows import Image
from .pipeline import Options, Pipeline, Result, shapes_of
from .record import InputGuard, Record
from .resume import ResumeState
from .serving.contract import Contract
from .serving.identity import manifest_entries
from .serving.session import Session
from .serving.trail import Trail
from .shard import ShardFile
from .stages import reading, stage
from .upscaler import plan_for
from .video.decode import Video
from .video.encode import PNG, Encoding, write_segment, write_y4m
from .video.images import Images, writes_images
from .video.mux import Muxer
from .video.picture import Picture, Range
from .video.source import Source, is_pipe
from .video.times import Times

REHEARSED_FRAMES = 3  # enough for an encoder to reorder them

log = logging.getLogger(__name__)


class Watcher(Protocol):
    """Who wants to know how a run goes."""

    def started(self, dst: Path, total: int, done: int) -> None:
        """Frames are about to pass: so many expected, 0 if unknown; so many finished earlier."""

    def advanced(self) -> None:
        """One more frame is written."""


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
        dst: The file to make; all or nothing, unfinished work stays in ``DST.part/``. A shard has a file
            of its own beside it.
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
        if kind:
            log.warning("metadata of %s is left out: %s is treated like any other clip", kind, source.path)
        cut_off = video.what_is_cut_off()
        if cut_off and options.range == Range() and not options.allow_damage:
            raise UpscaleError(f"the file {source.path} {cut_off}: get it whole, or pass --allow-damage")
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
        if options.shard and (is_pipe(dst) or source.is_pipe or writes_images(dst, source)):
            raise UpscaleError("expected a video from a file to a file for --shard, found images or a pipe")
        run = Run(video, session, options, watcher)
        if is_pipe(dst):
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
        self._part: tuple[int, int | None] = (0, None)
        if options.shard:
            expected = video.frames_expected(options.range)
            if not expected:
                raise UpscaleError(
                    f"expected a clip that says how long it is for --shard, found {video.path}, which does "
                    "not: put it into another container first, such as .mkv"
                )
            first, end = options.shard.frames(expected, options.segment_frames)
            self._part = first, None if options.shard.is_last else end

    def make(self, source: Source, dst: Path, guard: InputGuard) -> None:
        """Write a file or a folder of images, in segments that outlive a crash."""
        is_images = writes_images(dst, source)
        options = replace(self._options, encoding=PNG) if is_images else self._options
        identity = identity_of(guard.identity, self._session.contract, options)
        identity["picture"] = self._video.stream_index
        shard, weights = options.shard, self._session.weights()
        out = shard.path(dst) if shard else dst
        of_run = identity | ({"shard": [str(shard), *self._part]} if shard else {})
        with stage(f"cannot write {out}"), ResumeState(out, of_run, weights, options.restart) as part:
            if options.keep_existing and out.exists():
                raise HeldError(f"another run has finished {out}")
            join = (
                Images(part.joined, source)
                if is_images
                else Muxer(part.joined.with_suffix(dst.suffix), source, self._shapes.hr, options.selection)
            )
            rehearse(part.folder / "rehearsal.segment", join, self._shapes.hr, options.encoding)
            known = part.record()
            hr_frames = self._start(dst, known, options.encoding.codec.encoder)
            try:
                self._write_segments(part, hr_frames, options.encoding, guard)
                self._check_all_came()
                is_whole, last_duration = options.range == Range(), self._video.last_duration
                with stage("cannot write it"):
                    guard.check(closely=True)
                    if shard:
                        kept, (first, _) = part.record().pts, self._part
                        entries = manifest_entries(weights)
                        file = (out, shard, identity, entries, first, len(kept), last_duration, is_whole)
                        ShardFile(*file).write(part)
                    else:
                        times = Times(self._shapes.lr.time_base, self._feed.record.pts, last_duration)
                        join.write(part.segments(), times, is_whole)
                    guard.check()
                    part.finish()
            except HeldError:
                raise
            except UpscaleError as err:
                part.check()  # what went wrong may be that another run has taken over
                frames = len(part.record().pts)
                state = f"{frames} frames are kept in {part.folder}, the same command goes on from there"
                if source.is_pipe:
                    state = "a pipe cannot be read again: start over with --restart"
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
        """Write y4m to standard output, or to a named pipe."""
        hr_frames = self._start(dst, Record(), "rawvideo")
        try:
            with encoding_stage():
                write_y4m(dst, hr_frames, self._shapes.hr, self._options.encoding.pix_fmt)
            self._check_all_came()
            if len({after - before for before, after in pairwise(self._feed.record.pts)}) > 1:
                log.warning("the frames of %s are not evenly spaced, which y4m cannot say", self._video.path)
        except UpscaleError as err:
            raise self._stopped(err, "what came before is written") from err
        finally:
            self._feed.close()

    def _start(self, dst: Path, known: Record, encoder: str) -> Iterator[Image]:
        """Set the stages going; yields hr frames from the first that is not finished."""
        self._started_s = time.monotonic()
        self._finished = len(known.pts)
        options, layout = self._options, self._shapes.layout
        plan = plan_for(self._session, layout, options.memory, encoder, options.segment_frames)
        _say_how(self._session, self._shapes.layout.grid, self._options)
        first, end = self._part
        expected = self._video.frames_expected(self._options.range)
        trail = self._session.trail = Trail.new(
            layout.grid.count,
            first + self._finished,
            options.priority,
            in_sequences=self._session.contract.is_recurrent,
        )
        log.info("requests are named %s-%s-TILE", trail.run, trail.what.upper())
        self._watcher.started(dst, max(0, (end or expected) - first), self._finished)
        self._feed = Pipeline(
            self._video, self._session, self._shapes, self._options, known, plan, self._part
        )
        return self._counted(self._feed)

    def _counted(self, feed: Pipeline) -> Iterator[Image]:
        for image in feed:
            yield image
            self._new_frames += 1
            self._watcher.advanced()

    def _check_all_came(self) -> None:
        self._encode_s = time.monotonic() - self._started_s - self._feed.wait.busy_s
        # The last shard reads the clip from its beginning to its end, and answers for all.
        missing = None if self._part[1] is not None else self._video.what_is_missing()
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
            cuts_s=[
                float((cut - pts[0]) * shapes.lr.time_base) for cut in feed.record.part(0, len(pts)).cuts
            ],
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
    way = session.share_memory(lr_shape, options.transport)
    log.info("%s upscales; frames pass through %s", session.contract.model, way)
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
