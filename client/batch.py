"""Many clips in one go: which, and what each becomes."""

from __future__ import annotations

import glob
import logging
import os
import time
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

from .errors import HeldError, UpscaleError
from .lease import LEASE_S
from .pipeline import Options
from .progress import Progress
from .run import upscale
from .serving.session import Session
from .stages import reason_of
from .video.source import IMAGE_SUFFIXES, PIPE, Source, is_hidden, is_pipe

VIDEO_SUFFIXES = frozenset(
    f".{name}"
    for names in (
        "3g2 3gp asf avi divx dv f4v flv gif m2t m2ts m2v m4v mjpeg mjpg mkv mov mp4 mpe mpeg mpg",
        "mpv mts mxf nut ogm ogv qt rm rmvb ts vob webm wmv y4m",
    )
    for name in names.split()
)
KEPT_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv")  # others are written as Matroska, which holds every stream


HELD_POLL_S = 1.0

log = logging.getLogger(__name__)

Job = tuple[Source, Path]


def jobs_from_arguments(src: str, dst: Path, rate: Fraction, recursive: bool = False) -> list[Job]:
    """Pair the clips that IN means with the files they become.

    Args:
        src: ``-``, a file, a folder of videos or of one clip's images, or a pattern as ``'clips/*.mkv'``.
        dst: The file to make, or for a folder or a pattern the folder to fill.
        rate: Frames per second of a clip in images.
        recursive: Take the folders in a folder too, and make them again in the output's.

    Raises:
        UpscaleError: There is nothing to do, or an output is an input.
    """
    jobs = _jobs(src, dst, rate, recursive)
    for _, out in jobs:
        if out.exists() and any(one.path.exists() and out.samefile(one.path) for one, _ in jobs):
            raise UpscaleError(f"expected another name for the output, found that {out} is the input")
        if out.exists() and not (out.is_file() or out.is_dir() or is_pipe(out)):
            raise UpscaleError(f"expected a file name for the output, found a device: {out}")
    return jobs


def check_extras(extras: list[Path], jobs: list[Job], reference: Path | None) -> None:
    """Refuse to write a comparison or a report where it cannot be, or where something else is.

    Raises:
        UpscaleError: It is refused.
    """
    others = [path for job in jobs for path in (job[0].path, job[1])] + ([reference] if reference else [])
    for number, extra in enumerate(extras):
        if not extra.parent.is_dir():
            raise UpscaleError(f"cannot write {extra}: expected a folder {extra.parent}; create it")
        for other in others + extras[:number]:
            if extra.absolute() == other.absolute() or (
                extra.exists() and other.exists() and extra.samefile(other)
            ):
                raise UpscaleError(f"expected another name for {extra}, found that it is {other}")


def _jobs(src: str, dst: Path, rate: Fraction, recursive: bool) -> list[Job]:
    path = Path(src) if src == str(PIPE) or Path(src) != PIPE else Path(src).absolute()
    if is_pipe(path):
        return [(Source(path), dst)]
    if path.is_file():
        return [(Source(path), dst / _output_name(path) if dst.is_dir() else dst)]
    top = path
    if path.is_dir():
        inside = sorted(_files(path, dst) if recursive else filter(Path.is_file, path.iterdir()))
        seen = [file for file in inside if not is_hidden(file)]
        found = [file for file in seen if file.suffix.lower() in VIDEO_SUFFIXES]
        if not found and not recursive and any(file.suffix.lower() in IMAGE_SUFFIXES for file in seen):
            return [(Source(path, rate), dst)]
        left = Counter(file.suffix.lower() or "no suffix" for file in seen if file not in set(found))
        if found and left:
            what = ", ".join(f"{count} {suffix}" for suffix, count in sorted(left.items()))
            log.info("left out what is no video by its name: %s", what)
        what = f"a folder of videos or images, found none in {src}"
    elif glob.has_magic(src):
        found = sorted(Path(name) for name in glob.glob(src, recursive=True) if Path(name).is_file())
        what = f"files, found none that match {src!r}"
    else:
        raise UpscaleError(f"no such file: {src}; check the name")
    if not found:
        raise UpscaleError(f"expected {what}: check the name")
    if dst.exists() and not dst.is_dir():
        raise UpscaleError(f"expected a folder for the {len(found)} clips of {src}, found a file: {dst}")
    folders = [dst / file.parent.relative_to(top) if recursive and path.is_dir() else dst for file in found]
    jobs = [(Source(file), folder / _output_name(file)) for file, folder in zip(found, folders, strict=True)]
    if len({out for _, out in jobs}) < len(jobs):
        raise UpscaleError(
            f"expected files of different names, found equal ones in {src}: one run per folder, or name "
            "the folder around them with --recursive"
        )
    try:
        for folder in sorted({*folders, dst}):
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise UpscaleError(f"cannot make the folder {dst} ({err.strerror}): name another") from err
    return jobs


def _files(top: Path, out: Path) -> Iterator[Path]:
    """All files under a folder, but for outputs, unfinished runs and hidden folders."""
    for folder, names, files in os.walk(top):
        names[:] = [
            name
            for name in sorted(names)
            if not (name.startswith(".") or name.endswith(".part") or _is(Path(folder, name), out))
        ]
        yield from (Path(folder, name) for name in files if Path(folder, name).is_file())


def _is(one: Path, other: Path) -> bool:
    return other.exists() and one.samefile(other)


def _output_name(path: Path) -> str:
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return f"{path.stem}.png"
    return path.name if path.suffix.lower() in KEPT_SUFFIXES else f"{path.name}.mkv"


def run_all(jobs: list[Job], session: Session, options: Options, progress: Progress, overwrite: bool) -> bool:
    """Upscale clip after clip, whatever becomes of each.

    A clip that another run is writing is left to it. At the end it is looked at once more, when the lease of
    a run that had ended without a word would be over: then this one takes over.

    Returns:
        Whether nothing failed.
    """
    done, left_s = _pass_through(jobs, session, options, progress, overwrite)
    held = [job for job in jobs if job in left_s]
    for job in held:
        wait_for(job[1], left_s[job] + LEASE_S + HELD_POLL_S)
    again, _ = _pass_through(held, session, options, progress, overwrite, say_finished=False)
    return done and again


def wait_for(out: Path, until_s: float) -> None:
    """Wait for an output, or for a time on the clock that ``time.monotonic`` gives."""
    while not out.exists() and time.monotonic() < until_s:
        time.sleep(HELD_POLL_S)


def _pass_through(
    jobs: list[Job],
    session: Session,
    options: Options,
    progress: Progress,
    overwrite: bool,
    say_finished: bool = True,
) -> tuple[bool, dict[Job, float]]:
    """Return whether none failed, and when each was seen that another run is writing."""
    done, held = True, {}
    for job in jobs:
        src, dst = job
        if dst.exists() and not overwrite:
            if say_finished:
                progress.skipped(dst)
            continue
        try:
            progress.finished(dst, upscale(src, dst, session, options, progress))
        except HeldError as err:
            held[job] = time.monotonic()
            progress.close()
            progress.skipped(dst, str(err))
        except Exception as err:  # whatever is wrong with one clip, or with us, the others are done
            if os.environ.get("VSR_DEBUG"):
                raise
            progress.close()
            is_ours = not isinstance(err, UpscaleError)
            reason = f"unexpected {reason_of(err)}; VSR_DEBUG=1 shows where" if is_ours else str(err)
            progress.failed(src.path, reason)
            done = False
        finally:
            progress.close()
    return done, held
