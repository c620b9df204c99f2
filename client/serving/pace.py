"""How long a server takes for a window, learned from its answers, and after how long it counts as silent."""

from __future__ import annotations

GAIN, VARIANCE_GAIN, VARIANCES = 1 / 8, 1 / 4, 4  # smoothing of round-trip times after RFC 6298, section 2

LATE_AFTER = 2  # times the usual
LATE_FLOOR_S = 0.25
SILENT_AFTER = 8
SILENT_FLOOR_S = 10.0
# Until a size of window has been answered: its time is a guess, and a first run may compile or tune.
FIRST_LATE_FLOOR_S = 2.0
FIRST_SILENT_AFTER = 16
FIRST_SILENT_FLOOR_S = 60.0
LONGEST_SILENCE_S = 900.0


class Pace:
    """The time from a window's sending to its answer, in proportion to its pixels.

    A server that owes answers is silent when nothing has come from it for 8 times what a window usually
    takes, at least 10 s; before the first answer to a window of that size, 16 times what the probe makes one
    expect, at least a minute; never more than 15 minutes. Every time it was silent doubles that, until it
    answers.
    """

    def __init__(self, pixels: int, took_s: float) -> None:
        """Start with a guess from the probe."""
        self._pixels = 0  # of the window that was learned from last
        self._mean_s = took_s / pixels
        self._variance_s = 0.0
        self._silences = 0

    def learn(self, pixels: int, took_s: float) -> None:
        """Take in one answer."""
        took_s /= pixels
        if self._is_first(pixels):
            self._mean_s, self._variance_s = took_s, took_s / 2
        else:
            self._variance_s += VARIANCE_GAIN * (abs(self._mean_s - took_s) - self._variance_s)
            self._mean_s += GAIN * (took_s - self._mean_s)
        self._pixels = pixels
        self._silences = 0

    def usual_s(self, pixels: int) -> float:
        """How long a window of a size usually takes at most."""
        return pixels * (self._mean_s + VARIANCES * self._variance_s)

    def late_s(self, pixels: int) -> float:
        """After how long a window elsewhere is late: this server would probably have answered it by then."""
        floor_s = FIRST_LATE_FLOOR_S if self._is_first(pixels) else LATE_FLOOR_S
        return max(floor_s, LATE_AFTER * self.usual_s(pixels))

    def silence_s(self, pixels: int) -> float:
        """After how long without any answer a server that owes one counts as silent."""
        times, floor_s = (
            (FIRST_SILENT_AFTER, FIRST_SILENT_FLOOR_S)
            if self._is_first(pixels)
            else (SILENT_AFTER, SILENT_FLOOR_S)
        )
        return float(min(max(floor_s, times * self.usual_s(pixels)) * 2**self._silences, LONGEST_SILENCE_S))

    def was_silent(self) -> None:
        """Be more patient the next time."""
        self._silences += 1

    def _is_first(self, pixels: int) -> bool:
        return pixels != self._pixels
