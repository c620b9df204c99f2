"""What a clip is read from: a video file, a still image, a folder of numbered images, or standard input."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
from av.container import InputContainer

from ..errors import UpscaleError
from .y4m import Y4M_FORMAT, Y4mInput

IMAGE_SUFFIXES = frozenset((".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"))
PIPE = Path("-")
DEFAULT_RATE = Fraction(25)


# What glob(3), as FFmpeg calls it, takes for a pattern; Python's own escaping leaves braces as they are.
GLOB_MAGIC = re.compile(r"[\\*?\[\]{}~,]")


def file_url(path: Path) -> str:
    """Name a file for FFmpeg, which would take ``pipe:1`` or ``Alien: Part.mp4`` for a protocol."""
    return f"file:{path}"


def is_pipe(path: Path) -> bool:
    """Whether y4m passes there: ``-``, or a named pipe such as ``/dev/fd/63``."""
    return path == PIPE or path.is_fifo()


def is_hidden(path: Path) -> bool:
    """Whether a file is hidden, as ``.DS_Store`` and ``._film.mp4`` are."""
    return path.name.startswith(".")


@dataclass(frozen=True)
class Source:
    """A file or folder that can be opened as often as needed, or standard input, which cannot."""

    path: Path
    """``-`` is y4m on standard input; so is what a named pipe brings, such as ``/dev/fd/63``."""
    rate: Fraction = DEFAULT_RATE
    """Frames per second of a folder of images; files have their own."""
    stdin: Y4mInput = field(default_factory=Y4mInput, compare=False, repr=False)
    """Where a pipe is read from."""

    @property
    def is_pipe(self) -> bool:
        """Whether it can be read only once."""
        return is_pipe(self.path)

    @property
    def is_stills(self) -> bool:
        """Whether it is a still image or a folder of them."""
        return self.path.is_dir() or self.path.suffix.lower() in IMAGE_SUFFIXES

    def files(self) -> list[Path]:
        """The file, or the images of the folder in order.

        Raises:
            UpscaleError: The images are of several kinds, or their order is not plain.
        """
        if not self.path.is_dir():
            return [self.path]
        found = sorted(
            file
            for file in self.path.iterdir()
            if file.suffix.lower() in IMAGE_SUFFIXES and not is_hidden(file)
        )
        kinds = Counter(file.suffix for file in found)
        if len(kinds) != 1:
            what = ", ".join(f"{count} {suffix}" for suffix, count in kinds.items()) or "none"
            raise UpscaleError(f"expected images of one kind in {self.path}, found {what}: sort them first")
        numbered = sorted(found, key=lambda file: [int(n) for n in re.findall(r"\d+", file.name)])
        if numbered != found:
            raise UpscaleError(
                f"expected names in the order of their numbers in {self.path}, found {found[0].name} before "
                f"{found[1].name}: write the numbers with leading zeros"
            )
        return found

    def open(self) -> InputContainer:
        """Open it with FFmpeg; a folder is a video of its images.

        Raises:
            UpscaleError: It cannot be opened.
        """
        path: str | Y4mInput = file_url(self.path)
        format_, options = None, {}
        if self.is_pipe:
            if self.path != PIPE:
                self.stdin.open(self.path)
            path, format_ = self.stdin, Y4M_FORMAT
        elif self.path.is_dir():
            folder = GLOB_MAGIC.sub(r"\\\g<0>", str(self.path.absolute()))
            path = f"{folder}/*{self.files()[0].suffix}"
            format_, options = "image2", {"pattern_type": "glob", "framerate": str(self.rate)}
        elif self.is_stills and "%" in self.path.name:
            format_, options = "image2", {"pattern_type": "none"}
        try:
            return av.open(path, "r", format=format_, container_options=options, metadata_errors="replace")
        except FileNotFoundError as err:
            raise UpscaleError(f"no such file: {self.path}; check the name") from err
        except EOFError as err:
            raise UpscaleError(
                f"expected a video, found no frame in {self.path}: check that it plays"
            ) from err
        except av.FFmpegError as err:
            raise UpscaleError(
                f"expected a video, found {self.path} ({err.strerror}): check that it plays"
            ) from err
