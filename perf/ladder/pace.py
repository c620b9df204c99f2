"""From the times at which answers came to frames per second in the steady state."""

from __future__ import annotations

from collections.abc import Sequence

from perf.errors import PerfError


def enough(answers: int, elapsed_s: float, in_flight: int, frames: int, least_s: float) -> bool:
    """Whether a run may stop sending: whole clip in the steady state, and long enough."""
    return answers >= frames + in_flight and elapsed_s >= least_s


def steady_fps(done_s: Sequence[float], in_flight: int) -> float:
    """Frames per second between the answer that ends the start and the last request sent.

    The first ``in_flight`` answers wait for first runs of this size, and after the last request there is less
    in flight with every answer; neither counts.

    Args:
        done_s: When each answer came, seconds on any clock, ascending.
        in_flight: Requests kept in flight.

    Raises:
        PerfError: Nothing is left to count.
    """
    steady = done_s[in_flight - 1 : len(done_s) - in_flight + 1]
    if len(steady) < 2:
        raise PerfError(f"expected more than {2 * in_flight} answers, found {len(done_s)}: use more frames")
    return (len(steady) - 1) / (steady[-1] - steady[0])
