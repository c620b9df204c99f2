"""Windows in, hr frames out, in order: the requests in flight at one or many Triton servers."""

from __future__ import annotations

import heapq
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from tritonclient.utils import InferenceServerException

from ..errors import ServerError, UpscaleError
from ..frames.windows import Image
from .contract import Contract
from .identity import Identity, different_servers
from .server import START_HINT, Done
from .transports import AUTO

log = logging.getLogger(__name__)

FIRST_PAUSE_S = 0.25  # before a lost server is looked for again; doubles up to
LONGEST_PAUSE_S = 5.0
MOST_ATTEMPTS = 10  # of one window; a server that answers others and loses this one will not do better
# How gRPC says that nobody is there, or that a server on its way out dropped the call; the client
# itself cancels nothing before it hangs up. While Triton stops, it answers for seconds that it is
# "stopping" (UNAVAILABLE), then that the model "has no available versions" (NOT_FOUND). A session's
# servers have all served the ensemble once, so that one is gone is no mistake of the user's.
LOST = ("StatusCode.UNAVAILABLE", "StatusCode.CANCELLED", "StatusCode.NOT_FOUND")


class ServerProtocol(Protocol):
    """What a session needs of a server; ``server.Server`` is the real one."""

    address: str
    contract: Contract
    in_flight: int

    def check(self) -> None:
        """Return if the ensemble can be asked now, raise InferenceServerException otherwise."""

    def identity(self) -> Identity:
        """Tell the weights behind the server from others."""

    def share_memory(self, lr_shape: tuple[int, ...], transport: str) -> str:
        """Use shared memory for windows of this shape if possible; return how they pass."""

    def ask(self, lr_window: Image, done: Done) -> None:
        """Send one window; ``done`` gets the answer or the error, on any thread."""


@dataclass(order=True)
class _Job:
    """One window on its way; the window is let go as soon as its answer is here."""

    index: int
    lr_window: Image | None = field(compare=False)
    hr: Image | None = field(default=None, compare=False)
    attempts: int = field(default=0, compare=False)


@dataclass(eq=False)
class _Connection:
    """The connection to one server."""

    server: ServerProtocol
    capacity: int
    """Requests that keep the server busy."""
    busy: int = 0
    lost: bool = False
    trouble: str = ""
    """What was heard of it last, if it is lost."""
    look_again_at_s: float = 0.0
    pause_s: float = FIRST_PAUSE_S


_News = tuple[_Connection, _Job, "Image | None", "InferenceServerException | None"]
_Answers = queue.SimpleQueue["_News | None"]  # None: nobody wants more


class Session:
    """Shares windows over servers that hold the same ensemble, and hands the answers back in order.

    Windows are stateless: one whose server dies is sent again, to that server once it is back or to
    another. At most twice the requests in flight are held in memory, or what ``limit`` says.

    Args:
        servers: At least one; all with the same contract.
        patience_s: How long to go on without any server.
        stall_s: How long to wait for the next answer of servers that are there.
        allow_mixed_weights: Let servers with different weights answer, frame by frame.

    Raises:
        UpscaleError: The servers differ.
    """

    def __init__(
        self,
        servers: Sequence[ServerProtocol],
        patience_s: float = 60.0,
        stall_s: float = 900.0,
        allow_mixed_weights: bool = False,
    ) -> None:
        self.contract = servers[0].contract
        for server in servers[1:]:
            if server.contract != self.contract:
                raise UpscaleError(
                    f"expected one ensemble everywhere, found that {server.address} serves another "
                    f"{self.contract.model!r} than {servers[0].address}: "
                    "give --url only servers with the same model repository"
                )
        self.in_flight = sum(server.in_flight for server in servers)
        """Requests that keep all servers busy."""
        self._most_held = 2 * self.in_flight
        self.wait_s = 0.0
        """Time that the last round of windows spent with nothing to do but wait for an answer."""
        self.resent = 0
        """Windows that had to be sent again."""
        self._lines = [_Connection(server, server.in_flight) for server in servers]
        self._patience_s, self._stall_s = patience_s, stall_s
        self._busy_lock = threading.Lock()
        self._last_sign_of_life_s = time.monotonic()
        self._answered: _Answers = queue.SimpleQueue()
        different = None if allow_mixed_weights else different_servers(self.weights())
        if different:
            raise UpscaleError(
                f"expected the same weights everywhere, found that {different}; "
                "name servers of one model with --url, or pass --allow-mixed-weights"
            )

    def limit(self, windows: int) -> None:
        """Hold at most so many windows, or answers that wait for their turn, from the next round on.

        Args:
            windows: At least 1. Fewer than the requests that keep all servers busy are shared out over them;
                shared memory that is set up after this has room for no more.
        """
        self._most_held = windows
        for line in self._lines:
            share = -(-line.capacity * windows // self.in_flight)
            line.server.in_flight = min(line.capacity, share)

    def weights(self) -> dict[str, Identity]:
        """What weights each server has, by its address."""
        return {line.server.address: line.server.identity() for line in self._lines}

    def share_memory(self, lr_shape: tuple[int, ...], transport: str = AUTO) -> str:
        """Use shared memory for windows of this shape where it can be; return how they pass, and why."""
        ways = [line.server.share_memory(lr_shape, transport) for line in self._lines]
        return ways[0] if len(set(ways)) == 1 else "; ".join(ways)

    def hr_frames(self, lr_windows: Iterable[Image]) -> Iterator[Image]:
        """Yield the hr frame of every window, in the order of the windows.

        Args:
            lr_windows: (T, H, W, 3) uint8 RGB each; read only as far ahead as requests are in flight.

        Yields:
            (H * scale, W * scale, 3) uint8 RGB.

        Raises:
            UpscaleError: A server refused a window, or all of them stayed away.
        """
        self.wait_s = 0.0
        source = enumerate(lr_windows)
        in_order: deque[_Job] = deque()
        again: list[_Job] = []
        # Of this call; answers to an abandoned one disturb nobody.
        answered = self._answered = queue.SimpleQueue()
        more = True
        self._last_sign_of_life_s = time.monotonic()
        while True:
            self._look_for_lost_servers()
            while line := self._free_line():
                if again:
                    job = heapq.heappop(again)
                elif more and len(in_order) < self._most_held:
                    index, lr_window = next(source, (-1, None))
                    if lr_window is None:
                        more = False
                        break
                    job = _Job(index, lr_window)
                    in_order.append(job)
                else:
                    break
                self._send(job, line, answered)
            while in_order and (hr := in_order[0].hr) is not None:
                in_order.popleft()
                yield hr
            if in_order:
                lost = self._collect(answered)
                if lost is None:
                    return
                for job in lost:
                    heapq.heappush(again, job)
            elif not more:
                return

    def stop(self) -> None:
        """End the windows under way, from another thread than the one that may be waiting for them."""
        self._answered.put(None)

    def _free_line(self) -> _Connection | None:
        """The server with most room, if any has room."""
        free = [line for line in self._lines if not line.lost and line.busy < line.server.in_flight]
        return min(free, key=lambda line: line.busy / line.server.in_flight, default=None)

    def _send(self, job: _Job, line: _Connection, answered: _Answers) -> None:
        assert job.lr_window is not None

        def done(hr: Image | None, error: InferenceServerException | None) -> None:
            self._change_busy(line, -1)
            answered.put((line, job, hr, error))

        job.attempts += 1
        self._change_busy(line, 1)
        line.server.ask(job.lr_window, done)

    def _change_busy(self, line: _Connection, by: int) -> None:
        with self._busy_lock:
            line.busy += by

    def _collect(self, answered: _Answers) -> list[_Job] | None:
        """Wait for news, take in all there is, and return the windows to send again; None: stop."""
        look_again_at_s = [line.look_again_at_s for line in self._lines if line.lost and not line.busy]
        all_lost = all(line.lost for line in self._lines)
        give_up_s = self._last_sign_of_life_s + (self._patience_s if all_lost else self._stall_s)
        started_s = time.monotonic()
        again: list[_Job] = []
        try:
            news = answered.get(timeout=max(0.0, min([give_up_s, *look_again_at_s]) - started_s))
            while True:
                if news is None:
                    return None
                again += self._take(*news)
                news = answered.get_nowait()
        except queue.Empty:
            pass
        now_s = time.monotonic()
        self.wait_s += now_s - started_s
        if now_s >= give_up_s and not again:
            self._give_up(now_s)
        return again

    def _take(
        self, line: _Connection, job: _Job, hr: Image | None, error: InferenceServerException | None
    ) -> list[_Job]:
        if error is None:
            job.hr, job.lr_window = hr, None
            line.pause_s = FIRST_PAUSE_S
            self._last_sign_of_life_s = time.monotonic()
            return []
        forgotten = "shared memory region" in error.message()  # started again while nothing was under way
        if not (error.status() in LOST or forgotten) or job.attempts >= MOST_ATTEMPTS:
            raise UpscaleError(
                f"{line.server.address} refused frame {job.index + 1} of this run: {error.message()}; "
                "see the server's log"
            ) from error
        self.resent += 1
        if not line.lost:
            self._lose(line, error)
        return [job]

    def _lose(self, line: _Connection, error: InferenceServerException) -> None:
        if not any(other is not line and not other.lost for other in self._lines):
            self._last_sign_of_life_s = time.monotonic()  # patience starts when the last one is gone
        line.lost, line.trouble = True, error.message()
        line.look_again_at_s = time.monotonic() + line.pause_s
        line.pause_s = min(2 * line.pause_s, LONGEST_PAUSE_S)
        log.warning("lost %s (%s)", line.server.address, error.message())

    def _look_for_lost_servers(self) -> None:
        for line in self._lines:
            if line.lost and not line.busy and time.monotonic() >= line.look_again_at_s:
                try:
                    line.server.check()
                except InferenceServerException as err:
                    line.trouble = err.message()
                    line.look_again_at_s = time.monotonic() + line.pause_s
                    line.pause_s = min(2 * line.pause_s, LONGEST_PAUSE_S)
                else:
                    line.lost = False
                    log.warning("%s is back", line.server.address)

    def _give_up(self, now_s: float) -> None:
        silent_s = round(now_s - self._last_sign_of_life_s)
        names = ", ".join(line.server.address for line in self._lines)
        if all(line.lost for line in self._lines):
            trouble = "; ".join(sorted({line.trouble for line in self._lines}))
            raise ServerError(f"lost {names} and found no server for {silent_s} s: {START_HINT} [{trouble}]")
        raise ServerError(f"{names} gave no answer for {silent_s} s: see the server's log")
