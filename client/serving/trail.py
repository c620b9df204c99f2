"""What goes with every window, so that logs, traces and queues of a server can tell it from others."""

from __future__ import annotations

import os
import re
import secrets
from dataclasses import dataclass, field

PRIORITIES = {"live": 1, "batch": 2}
"""Levels of the queues of the composing models; a lower number goes first."""
BATCH = "batch"
RUN_DIGITS = 8  # of the trace id, in request ids
TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-([0-9a-f]{2})")  # W3C Trace Context


@dataclass(frozen=True)
class Tag:
    """What one request carries beside its window."""

    request_id: str = ""
    """RUN-FRAME-TILE; frames count from 1 in the clip, tiles from 0."""
    headers: dict[str, str] = field(default_factory=dict)
    priority: int = 0
    """0: the server's default."""
    sequence: int = 0
    """Which sequence a frame belongs to, where the model keeps a state; 0: none."""
    is_start: bool = False
    is_end: bool = False


NO_TAG = Tag()


def new_sequence_id() -> int:
    """Make an id that no other client has, nor an attempt of before: 63 random bits, not 0."""
    return secrets.randbits(63) | 1


@dataclass(frozen=True)
class Trail:
    """Names the requests of one run.

    The run's trace is the one of ``TRACEPARENT`` in the environment, where a caller has set one, else a new
    one. Every window is a span of it.
    """

    trace_id: str
    """32 hex digits."""
    flags: str = "01"
    tiles: int = 1
    """Of each frame."""
    first: int = 0
    """Frames of the clip before the first window."""
    priority: str = BATCH
    """One of ``PRIORITIES``."""
    what: str = "frame"
    """That the second number of an id counts: frames, or sequences from this run's first."""

    @classmethod
    def new(
        cls, tiles: int = 1, first: int = 0, priority: str = BATCH, *, in_sequences: bool = False
    ) -> Trail:
        """Begin one."""
        first, what = (0, "sequence") if in_sequences else (first, "frame")
        found = TRACEPARENT.fullmatch(os.environ.get("TRACEPARENT", ""))
        trace_id, flags = (found[1], found[2]) if found else (secrets.token_hex(16), "01")
        return cls(trace_id, flags, tiles, first, priority, what)

    @property
    def run(self) -> str:
        """The first part of its request ids."""
        return self.trace_id[:RUN_DIGITS]

    def tag(self, index: int) -> Tag:
        """Name a window: tiles of the first frame first."""
        frame, tile = divmod(index, self.tiles)
        traceparent = f"00-{self.trace_id}-{self.first * self.tiles + index + 1:016x}-{self.flags}"
        return Tag(
            f"{self.run}-{self.first + frame + 1}-{tile}",
            {"traceparent": traceparent},
            PRIORITIES[self.priority],
        )
