"""What a clip is read from: a video file, a still image, a folder of numbered images, or standard input."""

from __future__ import annotations

import glob
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


@dataclass(frozen=True)
class Source:
    """A file or folder that can be opened as often as needed, or standard input, which cannot."""

    path: Path
    """``-`` is y4m on standard input."""
    rate: Fraction = DEFAULT_RATE
    """Frames per second of a folder of images; files have their own."""
    stdin: Y4mInput = field(default_factory=Y4mInput, compare=False, repr=False)
    """Where ``-`` is read from."""

    @property
    def is_pipe(self) -> bool:
        """Whether it can be read only once."""
        return self.path == PIPE

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
        found = sorted(file for file in self.path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
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
        path: str | Y4mInput = str(self.path)
        format_, options = None, {}
        if self.is_pipe:
            path, format_ = self.stdin, Y4M_FORMAT
        elif self.path.is_dir():
            path = f"{glob.escape(str(self.path))}/*{self.files()[0].suffix}"
            format_, options = "image2", {"pattern_type": "glob", "framerate": str(self.rate)}
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
