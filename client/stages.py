"""Errors of reading, sending, encoding and writing, as an ``UpscaleError`` that names the stage."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from av import FFmpegError
from tritonclient.utils import InferenceServerException

from .errors import UpscaleError

# What files, FFmpeg and PyAV are known to raise over a clip or a disk; anything else is a mistake of ours.
FORESEEABLE = (
    FFmpegError,
    OSError,
    MemoryError,
    ValueError,  # UnicodeError, and values that PyAV has no name for
    ArithmeticError,  # rates and sizes of a file that are 0, or larger than PyAV's integers
    LookupError,
    NotImplementedError,
    InferenceServerException,
)


def reason_of(err: BaseException) -> str:
    """The shortest text that says what happened."""
    if isinstance(err, MemoryError):
        return "not enough memory"
    reason = getattr(err, "strerror", None) or str(err)
    return (
        str(reason) if isinstance(err, (FFmpegError, OSError)) and reason else f"{type(err).__name__}: {err}"
    )


@contextmanager
def stage(
    what_fails: str, what_to_do: str = "", kinds: tuple[type[Exception], ...] = FORESEEABLE
) -> Iterator[None]:
    """Name the stage that failed, in one line, for all that may be expected to go wrong in it.

    Args:
        what_fails: Such as "cannot read in.mp4".
        what_to_do: What the user may try next.
        kinds: Errors that mean that this stage has failed; others pass.

    Raises:
        UpscaleError: For every error of these kinds; one that has been named already stays as it is.
    """
    try:
        yield
    except UpscaleError:
        raise
    except kinds as err:
        remedy = f": {what_to_do}" if what_to_do else ""
        raise UpscaleError(f"{what_fails} ({reason_of(err)}){remedy}") from err


def reading(path: Path) -> AbstractContextManager[None]:
    """The stage that reads a clip."""
    return stage(f"cannot read {path}", "check that it plays")
