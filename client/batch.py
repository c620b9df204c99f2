"""Many clips in one go: which, and what each becomes."""

from __future__ import annotations

import glob
from fractions import Fraction
from pathlib import Path

from .errors import UpscaleError
from .video.source import IMAGE_SUFFIXES, PIPE, Source

VIDEO_SUFFIXES = frozenset(
    f".{name}"
    for names in ("3gp avi flv m2ts m4v mkv mov mp4 mpeg mpg mts", "mxf ogv ts vob webm wmv y4m")
    for name in names.split()
)
KEPT_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv")  # others are written as Matroska, which holds every stream


Job = tuple[Source, Path]


def jobs_from_arguments(src: str, dst: Path, rate: Fraction) -> list[Job]:
    """Pair the clips that IN means with the files they become.

    Args:
        src: ``-``, a file, a folder of videos or of one clip's images, or a pattern as ``'clips/*.mkv'``.
        dst: The file to make, or for a folder or a pattern the folder to fill.
        rate: Frames per second of a clip in images.

    Raises:
        UpscaleError: There is nothing to do, or an output is its own input.
    """
    jobs = _jobs(src, dst, rate)
    for source, out in jobs:
        if out.exists() and source.path.exists() and out.samefile(source.path):
            raise UpscaleError(f"expected another name for the output, found that {out} is the input")
    return jobs


def _jobs(src: str, dst: Path, rate: Fraction) -> list[Job]:
    path = Path(src)
    if path == PIPE:
        return [(Source(path), dst)]
    if path.is_file():
        return [(Source(path), dst / _output_name(path) if dst.is_dir() else dst)]
    if path.is_dir():
        found = [file for file in path.iterdir() if file.suffix.lower() in VIDEO_SUFFIXES]
        if not found and any(file.suffix.lower() in IMAGE_SUFFIXES for file in path.iterdir()):
            return [(Source(path, rate), dst)]
        what = f"a folder of videos or images, found none in {src}"
    elif glob.has_magic(src):
        found = [Path(name) for name in glob.glob(src, recursive=True) if Path(name).is_file()]
        what = f"files, found none that match {src!r}"
    else:
        raise UpscaleError(f"no such file: {src}; check the name")
    if not found:
        raise UpscaleError(f"expected {what}: check the name")
    if dst.exists() and not dst.is_dir():
        raise UpscaleError(f"expected a folder for the {len(found)} clips of {src}, found a file: {dst}")
    jobs = [(Source(file), dst / _output_name(file)) for file in sorted(found)]
    if len({out for _, out in jobs}) < len(jobs):
        raise UpscaleError(
            f"expected files of different names, found equal ones in {src}: one run per folder"
        )
    try:
        dst.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise UpscaleError(f"cannot make the folder {dst} ({err.strerror}): name another") from err
    return jobs


def _output_name(path: Path) -> str:
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return f"{path.stem}.png"
    return path.name if path.suffix.lower() in KEPT_SUFFIXES else f"{path.name}.mkv"
