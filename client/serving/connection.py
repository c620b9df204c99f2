"""One server of a session: whether it can be asked, how much at once, and the search for one that is lost."""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from queue import SimpleQueue
from typing import Protocol

from tritonclient.utils import InferenceServerException

from ..errors import ServerError, UpscaleError
from ..frames.sequences import FrameSequence
from ..frames.windows import Image
from .awake import awake_s
from .contract import Contract
from .faults import SILENT_STATUS
from .identity import Identity
from .pace import Pace
from .probe import probe_window
from .sequence import Cancel, Done
from .trail import NO_TAG, Tag

log = logging.getLogger(__name__)

FIRST_PAUSE_S = 0.25  # before a lost server is looked for again; doubles up to
LONGEST_PAUSE_S = 5.0
FIRST_BUSY_PAUSE_S = 0.05  # before a busy server is asked again; likewise
LONGEST_BUSY_PAUSE_S = 2.0


class ServerProtocol(Protocol):
    """What a session needs of a server; ``server.Server`` is the real one."""

    address: str
    contract: Contract
    in_flight: int
    probe_s: float

    def check(self) -> None:
        """Return if the ensemble can be asked now, raise InferenceServerException otherwise."""

    def identity(self) -> Identity:
        """Tell the weights behind the server from others."""

    def share_memory(self, lr_shape: tuple[int, ...], transport: str) -> str:
        """Use shared memory for windows of this shape if possible; return how they pass."""

    def ask(self, work: Image | FrameSequence, done: Done, tag: Tag) -> Cancel:
        """Send one window or sequence; ``done`` gets the answer or the error, once, on any thread."""


@dataclass(order=True)
class Job:
    """One window, or a sequence, on its way; it is let go as soon as its answer is here."""

    index: int
    work: Image | FrameSequence | None = field(compare=False)
    pixels: int = field(compare=False)
    hr: Image | None = field(default=None, compare=False)
    failures: int = field(default=0, compare=False)
    tag: Tag = field(default=NO_TAG, compare=False)
    under_way: list[Attempt] = field(default_factory=list, compare=False)
    """Attempts that may still give an answer in time."""


@dataclass(eq=False)
class Attempt:
    """One sending of a window to one server."""

    job: Job
    connection: Connection
    answers: Answers
    """Where the answer goes."""
    sent_s: float
    cancel: Cancel = lambda: None


News = tuple[Attempt, "Image | None", "InferenceServerException | None"]
Answers = SimpleQueue["News | str"]


class State(Enum):
    """Of a server, as its session sees it."""

    UP = "up"
    LOST = "lost"
    """Looked for in the background."""
    LEFT_OUT = "left out"
    """It is there, but with another model or other weights."""


class Connection:
    """One server of a session.

    The number of windows that it has at once falls to half when it is busy or was overtaken by another
    server, and grows by one for every round of answers, up to ``in_flight`` (additive increase,
    multiplicative decrease).

    Args:
        address: Of the server, for messages.
        server: The server, or None if it has not answered yet.
        admit: Called with the connection when a server was found; makes it UP, or raises UpscaleError if it
            must not be used.
        wake: Called when a search has ended.
        connect: Connects to one that has not answered yet; raises ServerError if it still does not.
    """

    def __init__(
        self,
        address: str,
        server: ServerProtocol | None,
        admit: Callable[[Connection], None],
        wake: Callable[[], None],
        connect: Callable[[], ServerProtocol] | None = None,
    ) -> None:
        self.address, self.server = address, server
        self.capacity = 0
        """Requests that keep the server busy; 0 as long as nobody knows."""
        self.state = State.UP if server else State.LOST
        self.trouble = ""
        """What was heard of it last, if it is not up."""
        self.shared: tuple[tuple[int, ...], str] | None = None
        """The shape and the transport that were last agreed upon."""
        self._connect, self._admit, self._wake = connect, admit, wake
        self._lock = threading.RLock()
        self._closed = threading.Event()
        self._attempts: set[Attempt] = set()
        self._heard_s = self._decreased_s = self._not_before_s = 0.0
        self._pause_s, self._busy_pause_s = FIRST_PAUSE_S, FIRST_BUSY_PAUSE_S
        if server:
            self._begin(server)
        else:
            self._search()

    def _begin(self, server: ServerProtocol) -> None:
        server.identity()
        window = probe_window(server.contract)
        self.pace = Pace(window.size, server.probe_s)
        self.capacity = server.in_flight
        self._limit = float(server.in_flight)
        self.server = server

    def limit(self, windows: int) -> None:
        """Let it have at most so many windows at once, and no more than keep it busy."""
        assert self.server
        with self._lock:
            self.server.in_flight = min(self.capacity, windows)
            self._limit = min(self._limit, float(self.server.in_flight))

    @property
    def load(self) -> float:
        """How much of what it may have at once it has."""
        return len(self._attempts) / self._limit

    @property
    def bytes_in_flight(self) -> int:
        """Of windows that it owes an answer to."""
        with self._lock:
            return sum(attempt.job.pixels for attempt in self._attempts)  # a byte each

    def has_room(self, now_s: float) -> bool:
        """Whether it can be sent a window now."""
        return self.free_at_s() is not None and now_s >= self._not_before_s

    def free_at_s(self) -> float | None:
        """From when it can be sent a window, by ``awake_s``; None: it has all it may have."""
        is_full = self.state is not State.UP or len(self._attempts) >= int(self._limit)
        return None if is_full else self._not_before_s

    def late_after_s(self, pixels: int) -> float:
        """After how long this server may take over a window that another one has."""
        return self.pace.late_s(pixels)

    def send(self, job: Job, answers: Answers) -> Attempt:
        """Send a window; the answer goes to a queue."""
        assert self.server and job.work is not None
        attempt = Attempt(job, self, answers, awake_s())

        def done(hr: Image | None, error: InferenceServerException | None) -> None:
            self._note(attempt, hr is not None)
            answers.put((attempt, hr, error))

        with self._lock:
            self._attempts.add(attempt)
        job.under_way.append(attempt)
        attempt.cancel = self.server.ask(job.work, done, job.tag)
        return attempt

    def _note(self, attempt: Attempt, is_answer: bool) -> None:
        """Take in that something came from the server."""
        with self._lock:
            now_s = self._heard_s = awake_s()
            self._attempts.discard(attempt)
            if not is_answer:
                return
            self.pace.learn(attempt.job.pixels, now_s - attempt.sent_s)
            assert self.server
            self._limit = min(float(self.server.in_flight), self._limit + 1 / self._limit)
            self._pause_s, self._busy_pause_s = FIRST_PAUSE_S, FIRST_BUSY_PAUSE_S
            self.trouble = ""

    def ask_for_less(self, attempt: Attempt, is_busy: bool) -> None:
        """Halve what it has at once, once for all that was sent before it was last halved.

        Args:
            attempt: Refused because the server is busy, or overtaken by another server.
            is_busy: Also wait a moment before the next.
        """
        with self._lock:
            if attempt.sent_s < self._decreased_s:
                return
            self._decreased_s = awake_s()
            if self.server and self._limit == self.server.in_flight and is_busy:
                log.info("%s is busy: it gets fewer windows at once", self.address)
            self._limit = max(1.0, self._limit / 2)
            if is_busy:
                # Clients that were refused together must not come back together.
                self._not_before_s = self._decreased_s + self._busy_pause_s * random.uniform(0.5, 1)
                self._busy_pause_s = min(2 * self._busy_pause_s, LONGEST_BUSY_PAUSE_S)

    def silent_at_s(self) -> float | None:
        """When it counts as silent unless something comes from it, by ``awake_s``."""
        with self._lock:
            oldest = min(self._attempts, key=lambda attempt: attempt.sent_s, default=None)
            if oldest is None:
                return None
            return max(oldest.sent_s, self._heard_s) + self.pace.silence_s(oldest.job.pixels)

    def give_up_if_silent(self) -> None:
        """Count the server as lost if it has owed an answer too long; those that yet come are still taken."""
        with self._lock:
            silent_at_s = self.silent_at_s()
            if silent_at_s is None or awake_s() < silent_at_s:
                return
            attempts, self._attempts = self._attempts, set()
            silent_s = awake_s() - min(attempt.sent_s for attempt in attempts)
            self.pace.was_silent()
        error = InferenceServerException(f"no answer for {silent_s:.0f} s", status=SILENT_STATUS)
        for attempt in attempts:
            attempt.answers.put((attempt, None, error))
        self.lose(error.message())

    def cancel(self, answers: Answers) -> None:
        """Cancel all attempts whose answers go to a queue that nobody reads any more, if that can be."""
        with self._lock:
            attempts = [attempt for attempt in self._attempts if attempt.answers is answers]
        for attempt in attempts:
            attempt.cancel()

    def lose(self, trouble: str) -> None:
        """Ask it no more, and look for it in the background."""
        with self._lock:
            if self.state is not State.UP:
                return
            self.state, self.trouble = State.LOST, trouble
        log.warning("lost %s (%s)", self.address, trouble)
        self._search()

    def _search(self) -> None:
        threading.Thread(target=self._search_until_found, daemon=True).start()

    def _search_until_found(self) -> None:
        was_there = self.server is not None
        while not self._closed.wait(self._pause_s):
            if self._attempts:  # it may yet answer those, or fail each of them
                continue
            try:
                if self.server:
                    self.server.check()
                elif self._connect:
                    self._begin(self._connect())
                self._admit(self)
            except (InferenceServerException, ServerError) as err:
                self.trouble = str(err.message() if isinstance(err, InferenceServerException) else err)
            except UpscaleError as err:
                self.trouble, self.state = str(err), State.LEFT_OUT
                log.warning("%s is left out: %s", self.address, err)
                break
            except Exception as err:  # whatever a library raises, the search goes on
                self.trouble = f"{type(err).__name__}: {err}"
            else:
                log.warning("%s is %s", self.address, "back" if was_there else "there now")
                break
            with self._lock:
                self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
        self._wake()

    def close(self) -> None:
        """End the search."""
        self._closed.set()
