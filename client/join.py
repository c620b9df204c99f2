"""``mst-gan-upscale join IN OUT``: the shards of a clip, upscaled anywhere, become the finished clip."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import click

from .durable import rename
from .errors import UpscaleError
from .options import TopicCommand, streams, topic_options, track_options
from .pipeline import hr_picture
from .record import InputGuard, Record
from .resume import ResumeState
from .serving.identity import Identity, unknown_weights
from .shard import ShardFile, shards_of
from .stages import reading, stage
from .video.decode import Video
from .video.mux import Muxer
from .video.source import Source
from .video.streams import Selection
from .video.times import Times


@dataclass(frozen=True)
class Joined:
    """What was joined."""

    frames: int
    shards: int


def join_shards(source: Source, out: Path, selection: Selection) -> Joined:
    """Put the shards of a clip together, verified like the output of one run.

    No server is needed. The shards stay where they are.

    Args:
        source: The clip they were made from.
        out: The file to make; its shards lie beside it.
        selection: Which of the source's streams are wanted.

    Raises:
        UpscaleError: A shard is missing, damaged, or of another clip, model or settings.
    """
    files = shards_of(out)
    identity = files[0].identity
    weights = _weights_of(files)
    with reading(source.path):
        guard = InputGuard(source)
        if guard.identity != identity["input"]:
            raise UpscaleError(f"expected the clip that {files[0].path} was made from, found {source.path}")
        video = Video(source, selection, identity["deinterlacing"])
    with video, stage(f"cannot write {out}"):
        if video.stream_index != identity["picture"]:
            raise UpscaleError(
                f"expected the picture to be stream {identity['picture']}, as in {files[0].path}, found "
                f"stream {video.stream_index}: give --streams as for the shards"
            )
        scale = int(identity["model parameters"]["scale"])
        final_size = tuple(identity["final size"])
        picture = hr_picture(video.picture, scale, final_size or None, identity["square pixels"])
        with ResumeState(out, identity, weights) as part:
            for index, (segment, record) in enumerate(one for file in files for one in file.segments()):
                path = part.segment(index)
                unfinished = path.with_suffix(".unfinished")
                unfinished.write_bytes(segment)
                rename(unfinished, path)
                part.keep(path, Record.from_json([record]))
            pts = part.record().pts
            expected = sum(file.frames for file in files)
            if len(pts) != expected:
                raise UpscaleError(f"expected {expected} frames in the shards of {out}, found {len(pts)}")
            times = Times(picture.time_base, pts, files[-1].last_duration)
            Muxer(part.joined, source, picture, selection).write(part.segments(), times, files[0].is_whole)
            guard.check(closely=True)
            part.finish()
    return Joined(expected, len(files))


def _weights_of(files: list[ShardFile]) -> Mapping[str, Identity]:
    """Of all shards, by their names; which are the same.

    Raises:
        UpscaleError: One was made with other weights.
    """
    first, *others = (
        {
            f"{file.path} ({number})": one
            for number, one in enumerate(map(Identity.from_json, file.weights))
            if one
        }
        for file in files
    )
    for weights in others:
        unknown = unknown_weights(weights, files[0].weights)
        if unknown:
            raise UpscaleError(f"expected shards of the same weights: {unknown}; upscale that shard again")
    return first


on_input, on_output, on_run = map(topic_options, ("What is read", "What is written", "The run"))


@click.command(cls=TopicCommand, context_settings={"auto_envvar_prefix": "UPSCALE", "max_content_width": 110})
@click.argument("src", metavar="IN", type=click.Path(path_type=Path))
@click.argument("dst", metavar="OUT", type=click.Path(path_type=Path))
@on_input("--streams", type=streams, metavar="N,N", help="Streams of IN by number, as for the shards.")
@track_options(on_output)
@on_output("--overwrite", is_flag=True, help="Replace OUT if it exists.")
@on_run("--quiet", is_flag=True, help="Say only what goes wrong.")
def join(
    src: Path,
    dst: Path,
    streams: tuple[frozenset[int] | None, frozenset[int]] | None,
    audio: str,
    no_subtitles: bool,
    overwrite: bool,
    quiet: bool,
) -> None:
    """Join the shards of IN, which lie beside OUT, into OUT: sound, subtitles and times as in IN.

    The shards are made by --shard 1/N to --shard N/N, on any machine. They stay until they are deleted.
    """
    logging.basicConfig(format="%(message)s", level=logging.WARNING if quiet else logging.INFO)
    try:
        if dst.exists() and not overwrite:
            raise UpscaleError(f"{dst} exists: pass --overwrite to replace it")
        selection = Selection(*(streams or (None, frozenset())), audio=audio, subtitles=not no_subtitles)
        done = join_shards(Source(src), dst, selection)
        if not quiet:
            click.echo(f"{dst}: {done.frames} frames of {done.shards} shards")
    except UpscaleError as err:
        raise click.ClickException(str(err)) from err
