"""A clock that stands still while this process does: stopped, on a paused machine, or starved."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

from tritonclient.utils import InferenceServerException

Answer = TypeVar("Answer")

TICK_S = 0.25  # how often it is read at least
LONGEST_GAP_S = 1.0  # between two readings; longer, and nothing of this process ran meanwhile


class AwakeClock:
    """Seconds in which this process ran; never goes back.

    A server's silence is measured by it: no answer can be taken in while the client itself stands still.

    Args:
        monotonic: The clock that goes on, in seconds.
    """

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._read_s: float | None = None
        self._stood_still_s = 0.0

    def now_s(self) -> float:
        """Read the clock."""
        with self._lock:
            now_s = self._monotonic()
            if self._read_s is None:
                threading.Thread(target=self._tick, daemon=True).start()
            elif now_s - self._read_s > LONGEST_GAP_S:
                self._stood_still_s += now_s - self._read_s
            self._read_s = now_s
            return now_s - self._stood_still_s

    def stood_still_s(self) -> float:
        """How long the process has stood still so far, as far as this clock knows."""
        self.now_s()
        return self._stood_still_s

    def _tick(self) -> None:
        while True:
            time.sleep(TICK_S)
            self.now_s()


CLOCK = AwakeClock()
"""Of this process."""


def awake_s() -> float:
    """Read this process's clock, in seconds."""
    return CLOCK.now_s()


def answer_of(ask: Callable[[], Answer]) -> Answer:
    """Ask a server; again if the deadline of the question passed while this process stood still.

    Raises:
        InferenceServerException: What ``ask`` raises.
    """
    while True:
        stood_still_s = CLOCK.stood_still_s()
        try:
            return ask()
        except InferenceServerException as err:
            is_late = err.status() == "StatusCode.DEADLINE_EXCEEDED"
            if not is_late or CLOCK.stood_still_s() == stood_still_s:
                raise
