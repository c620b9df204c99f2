"""The boundary to PyAV and FFmpeg: whatever they raise over a clip becomes that clip's error.

PyAV raises more than its own errors over unusual files: values that its enumerations do not know
(ValueError), streams without a codec (AttributeError), numbers that C integers cannot hold (OverflowError).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import TypeVar

import av

from ..stages import stage

Item = TypeVar("Item")

# What a decoder says of one packet: broken, as of another codec that begins in the middle, or beyond it.
UNDECODABLE = (
    av.error.InvalidDataError,
    av.error.PatchWelcomeError,
    av.error.ExternalError,
    av.error.UnknownError,
)


def media_errors(what_fails: str, remedy: str = "check that it plays") -> AbstractContextManager[None]:
    """Turn every error in a block into one line about the clip.

    Args:
        what_fails: Such as ``cannot read in.mp4``.
        remedy: What the user may do about it.

    Raises:
        UpscaleError: For any error.
    """
    return stage(what_fails, remedy, kinds=(Exception,))


def guarded(items: Iterator[Item], what_fails: str) -> Iterator[Item]:
    """Pass items on; an error while one is fetched is one line about the clip."""
    while True:
        with media_errors(what_fails):
            try:
                item = next(items)
            except StopIteration:
                return
        yield item
