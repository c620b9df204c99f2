"""Upscale a video with the ensemble that a Triton server serves: ``python client/upscale.py IN OUT``."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click

from .batch import check_extras, jobs_from_arguments, run_all
from .errors import UpscaleError
from .frames.scenes import DEFAULT_THRESHOLD
from .join import join
from .metrics import serve_metrics
from .options import (
    TopicCommand,
    byte_count,
    frames_per_second,
    height_and_width,
    host_and_port,
    seconds,
    shard,
    streams,
    topic_options,
    track_options,
)
from .pipeline import Options, Result
from .progress import ConsoleProgress, JsonProgress, Progress, echo
from .reports.compare import check_target
from .reports.compare import compare as compare_clips
from .reports.html_report import check_reference, write_page
from .run import upscale
from .serving.addresses import DEFAULT_URL
from .serving.opening import (
    AUTO_MODE,
    DEFAULT_MODEL,
    DEFAULT_PATIENCE_S,
    MODES,
    STREAM_MODEL,
    open_session,
)
from .serving.security import Security
from .serving.session import Session
from .serving.trail import BATCH, PRIORITIES
from .serving.transports import AUTO, GRPC, TRANSPORTS
from .shard import Shard
from .stages import stage
from .video.decode import Video
from .video.deinterlace import DEINTERLACE, OFF
from .video.encode import CODECS, DEFAULT_CODEC, encoding_from_options
from .video.images import writes_images
from .video.picture import Range
from .video.source import PIPE, Source, is_pipe
from .video.streams import Selection

EXIT_FAILED = 1
EXIT_STOPPED = 130  # as shells report Ctrl-C


def run_one(src: Source, dst: Path, session: Session, options: Options, progress: Progress) -> Result:
    """Upscale one clip."""
    try:
        result = upscale(src, dst, session, options, progress)
    finally:
        progress.close()
    progress.finished(dst, result)
    return result


def rehearse(src: Source, dst: Path, session: Session, options: Options) -> str:
    """Upscale the first frames into a folder that vanishes, and estimate from them what all would take."""
    with Video(src, options.selection, options.deinterlace) as video, TemporaryDirectory() as folder:
        expected = video.frames_expected(options.range)
        few = replace(options, range=replace(options.range, frames=min(session.in_flight, expected or 1)))
        sample = Path(folder) / dst.name
        result = upscale(src, sample, session, few, Progress())
        written = list(sample.iterdir()) if sample.is_dir() else [sample]
        megabytes = sum(path.stat().st_size for path in written) / result.frames * expected / 1e6
    height, width = result.hr_size
    return (
        f"{src.path}: {expected} frames to {dst}, {width}x{height}, about {expected / result.fps:.0f} s and "
        f"{megabytes:.1f} MB, by its first {result.frames} frames"
    )


def output(text: str) -> Path:
    """Read OUT; ``./-`` is a file of that name."""
    return Path(text).absolute() if Path(text) == PIPE and text != str(PIPE) else Path(text)


on_server, on_input, on_output, on_run = map(
    topic_options, ("The server", "What is read", "What is written", "The run")
)
a_file = click.Path(path_type=Path)


class UpscaleCommand(TopicCommand):
    """The command, and the one that follows it under the name ``join``."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """Read the arguments of the command that is meant."""
        if args and args[0] == join.name:
            return join.make_context(f"{info_name} {join.name}", args[1:], parent, **extra)
        return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command whose arguments these are."""
        return super().invoke(ctx) if ctx.command is self else ctx.command.invoke(ctx)


@click.command(
    cls=UpscaleCommand, context_settings={"auto_envvar_prefix": "UPSCALE", "max_content_width": 110}
)
@click.argument("src", metavar="IN")
@click.argument("dst", metavar="OUT", type=output)
@on_server("--url", default=DEFAULT_URL, metavar="A,B,...", help=f"gRPC addresses [{DEFAULT_URL}].")
@on_server(
    "--mode",
    type=click.Choice(list(MODES)),
    default=AUTO_MODE,
    metavar="HOW",
    help=f"window, stream, {AUTO_MODE}: stream if it is served [{AUTO_MODE}].",
)
@on_server("--model", metavar="NAME", help=f"Another ensemble than {DEFAULT_MODEL} or {STREAM_MODEL}.")
@on_server(
    "--patience",
    type=click.FloatRange(0),
    default=DEFAULT_PATIENCE_S,
    metavar="SECONDS",
    help=f"How long to wait for a lost server [{DEFAULT_PATIENCE_S:g}].",
)
@on_server(
    "--transport",
    type=click.Choice(TRANSPORTS),
    default=AUTO,
    metavar="WAY",
    help=f"{', '.join(TRANSPORTS)} [{AUTO}].",
)
@on_server(
    "--priority",
    type=click.Choice(list(PRIORITIES)),
    default=BATCH,
    metavar="WHOSE",
    help=f"live: before all others; {BATCH} [{BATCH}].",
)
@on_server("--allow-mixed-weights", is_flag=True, help="Let servers with different weights share a clip.")
@on_server("--tls-ca", type=a_file, metavar="FILE", help="Authorities to trust, for grpcs:// addresses.")
@on_server("--tls-cert", type=a_file, metavar="FILE", help="Certificate of this client.")
@on_server("--tls-key", type=a_file, metavar="FILE", help="Key of this client.")
@on_server("--token", metavar="TEXT", help="Bearer token; better in UPSCALE_TOKEN than here.")
@on_input("--start", type=seconds, default="0", metavar="TIME", help="Begin here: seconds or H:MM:SS [0].")
@on_input("--duration", type=seconds, metavar="TIME", help="Go on for so long.")
@on_input("--max-frames", type=click.IntRange(1), metavar="N", help="Upscale at most so many frames.")
@on_input("--rate", type=frames_per_second, default="25", metavar="FPS", help="Of a folder of images [25].")
@on_input(
    "--scene-threshold",
    type=click.FloatRange(0, 255, min_open=True),
    default=DEFAULT_THRESHOLD,
    metavar="N",
    help=f"Gray levels of change that are a cut; 255: none [{DEFAULT_THRESHOLD:g}].",
)
@on_input(
    "--streams",
    type=streams,
    metavar="N,N",
    help="Streams of IN by number: 0,1 alone; -2: all but 2.",
)
@on_input(
    "--deinterlace",
    type=click.Choice(DEINTERLACE),
    default=OFF,
    metavar="WHICH",
    help=f"auto: frames marked interlaced; on: all [{OFF}].",
)
@on_input("--recursive", is_flag=True, help="Take the folders in IN too, and make them in OUT.")
@on_input("--allow-hdr", is_flag=True, help="Upscale PQ and HLG clips too, in 8 bits.")
@on_input("--allow-damage", is_flag=True, help="Accept that frames cannot be read.")
@on_output(
    "--codec", type=click.Choice(list(CODECS)), metavar="NAME", help=f"{', '.join(CODECS)} [{DEFAULT_CODEC}]."
)
@on_output("--crf", type=click.IntRange(0, 63), metavar="N", help="Quality; lower is better and larger.")
@on_output("--preset", metavar="NAME", help="Speed of the encoder, in its own words.")
@on_output("--pix-fmt", metavar="NAME", help="Pixel format, such as yuv420p10le.")
@on_output("--final-size", type=height_and_width, metavar="WxH", help="Such as 3840x2160; else 4 times IN's.")
@on_output("--square-pixels", is_flag=True, help="Stretch the picture of an anamorphic clip.")
@track_options(on_output)
@on_output("--compare", type=a_file, metavar="PATH", help="Also bicubic | ours: a .png or a video.")
@on_output("--report", "report_page", type=a_file, metavar="PATH", help="Also a page about the run: .html.")
@on_output("--reference", type=a_file, metavar="CLIP", help="The truth, for PSNR and SSIM in the report.")
@on_output("--overwrite", is_flag=True, help="Replace OUT if it exists.")
@on_run(
    "--segment-frames",
    type=click.IntRange(1),
    default=100,
    metavar="N",
    help="Work is kept in pieces of so many frames [100].",
)
@on_run(
    "--memory",
    type=byte_count,
    metavar="SIZE",
    help="For frames under way, such as 2G [a quarter of all].",
)
@on_run("--shard", type=shard, metavar="I/N", help="Upscale part I of N alone; then: join IN OUT.")
@on_run("--restart", is_flag=True, help="Throw away what an unfinished run left beside OUT.")
@on_run("--dry-run", is_flag=True, help="Try a few frames; estimate time and size.")
@on_run("--json", "as_json", is_flag=True, help="Tell programs: one JSON object a line on stdout.")
@on_run(
    "--metrics-port",
    type=host_and_port,
    metavar="PORT",
    help="Metrics for Prometheus; 0.0.0.0:PORT: for others.",
)
@on_run("--quiet", is_flag=True, help="Say only what goes wrong.")
def main(
    src: str,
    dst: Path,
    url: str,
    mode: str,
    model: str | None,
    codec: str | None,
    crf: int | None,
    preset: str | None,
    pix_fmt: str | None,
    segment_frames: int,
    memory: int | None,
    allow_mixed_weights: bool,
    tls_ca: Path | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    token: str | None,
    transport: str,
    priority: str,
    patience: float,
    start: Fraction,
    duration: Fraction | None,
    max_frames: int | None,
    rate: Fraction,
    final_size: tuple[int, int] | None,
    compare: Path | None,
    report_page: Path | None,
    reference: Path | None,
    scene_threshold: float,
    streams: tuple[frozenset[int] | None, frozenset[int]] | None,
    deinterlace: str,
    square_pixels: bool,
    audio: str,
    no_subtitles: bool,
    recursive: bool,
    allow_hdr: bool,
    shard: Shard | None,
    restart: bool,
    allow_damage: bool,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
    metrics_port: tuple[str, int] | None,
    quiet: bool,
) -> None:
    """Upscale the video IN into OUT; sound, subtitles and times stay as they are.

    IN may be a folder of videos or a quoted pattern; OUT is a folder then, and what is in it already
    is left alone. IN may also be a still image or a folder of numbered images, and OUT a PNG file or a
    new folder; and - is y4m on standard input or output.

    Many machines may share a folder of videos, each with the same command; or one video, each with another
    --shard, and join IN OUT puts the parts together.

    Every option has an environment variable: UPSCALE_URL, UPSCALE_CRF, ... Exit status: 0 all done,
    1 something failed, 2 wrong usage, 130 stopped by Ctrl-C. A run that failed or was stopped goes on
    where it was when it is started again.
    """
    is_verbose = not (quiet or as_json)
    logging.basicConfig(format="%(message)s", level=logging.INFO if is_verbose else logging.WARNING)
    progress = JsonProgress() if as_json else Progress() if quiet else ConsoleProgress()
    try:
        jobs = jobs_from_arguments(src, dst, rate, recursive)
        if jobs[0][0].is_pipe and dry_run:
            raise UpscaleError("expected a clip that can be read twice for --dry-run, found a pipe")
        if is_pipe(dst) and (as_json or dry_run or len(jobs) > 1 or codec):
            raise UpscaleError(
                "expected one clip for y4m on standard output, without --json, --dry-run, --codec"
            )
        if (compare or report_page) and (len(jobs) > 1 or dry_run or is_pipe(dst) or jobs[0][0].is_pipe):
            raise UpscaleError("expected one clip from a file to a file for --compare and --report")
        if reference and not (report_page and reference.exists()):
            raise UpscaleError(f"expected --report and an existing file for --reference, found {reference}")
        if compare:
            check_target(compare)
        check_extras(list(filter(None, (compare, report_page))), jobs, reference)
        is_batch = len(jobs) > 1 or jobs[0][0].path not in (Path(src), Path(src).absolute())
        made = shard.path(jobs[0][1]) if shard else jobs[0][1]
        if not (shard or is_batch or dry_run or overwrite or is_pipe(dst)) and made.exists():
            raise UpscaleError(f"{made} exists: pass --overwrite to replace it")
        if shard and (is_batch or dry_run or compare or report_page):
            raise UpscaleError("expected one clip for --shard, without --dry-run, --compare and --report")
        if shard and made.exists() and not overwrite:  # schedulers may start a finished task again
            progress.skipped(made)
            return
        if square_pixels and final_size:
            raise UpscaleError("expected --square-pixels or --final-size, found both")
        if any(writes_images(out, source) for source, out in jobs) and (codec or crf or preset or pix_fmt):
            raise UpscaleError("images are written as PNG: leave --codec, --crf, --preset and --pix-fmt out")
        options = Options(
            encoding=encoding_from_options(codec or DEFAULT_CODEC, crf, preset, pix_fmt),
            segment_frames=segment_frames,
            scene_threshold=scene_threshold,
            range=Range(start, duration, max_frames),
            final_size=final_size,
            memory=memory,
            transport=transport,
            priority=priority,
            restart=restart,
            allow_damage=allow_damage,
            allow_hdr=allow_hdr,
            selection=Selection(*(streams or (None, frozenset())), audio=audio, subtitles=not no_subtitles),
            deinterlace=deinterlace,
            square_pixels=square_pixels,
            shard=shard,
            keep_existing=is_batch and not overwrite,
        )
        security = Security(tls_ca, tls_cert, tls_key, token)
        if mode == AUTO_MODE and transport not in (AUTO, GRPC):
            mode = "window"  # which alone knows shared memory
        models = model or MODES[mode]
        with (
            serve_metrics(metrics_port, progress) as watch,
            open_session(url.split(","), models, security, patience, allow_mixed_weights) as session,
        ):
            watch(session)
            if dry_run:
                for one, out in jobs:
                    echo(rehearse(one, out, session, options))
            elif is_batch:
                if not run_all(jobs, session, options, progress, overwrite):
                    sys.exit(EXIT_FAILED)
            else:
                source, out = jobs[0]
                if reference:
                    with stage(f"cannot read {reference}", "check that it plays"):
                        check_reference(reference, source, session.contract, options)
                result = run_one(source, out, session, options, progress)
                if report_page:
                    made_by = f"{session.contract.model} at {url}"
                    with stage(f"cannot write the report {report_page}"):
                        write_page(report_page, source, options, out, result, made_by, reference)
                if compare:
                    with stage(f"cannot write the comparison {compare}"):
                        compare_clips(source, options, out, compare)
    except UpscaleError as err:
        if as_json:
            progress.failed(Path(src), str(err))
        if os.environ.get("VSR_DEBUG"):
            raise
        raise click.ClickException(str(err)) from err
    except KeyboardInterrupt:
        click.echo("stopped; what is finished is kept, the same command goes on from there", err=True)
        sys.exit(EXIT_STOPPED)


if __name__ == "__main__":
    main()
