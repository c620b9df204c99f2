"""The windows of one clip on their way through the servers of a session, and their answers in order."""

from __future__ import annotations

import heapq
import queue
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

from tritonclient.utils import InferenceServerException

from ..errors import ServerError, UpscaleError
from ..frames.sequences import FrameSequence
from ..frames.windows import Image
from .awake import awake_s
from .connection import Answers, Attempt, Connection, Job, News, State
from .faults import Fault, fault_of
from .server import START_HINT
from .trail import Trail

MOST_FAILURES = 10  # of one window; a server that answers others and loses this one will not do better
STOP, WAKE = "stop", "wake"  # put among the answers


class Dispatch:
    """Sends every window to a server, and again if it must be; the first answer counts.

    A window that is late is also sent to a second server, the oldest first, when that server has nothing
    else to do. Answers to a window that has one already are dropped.

    Args:
        connections: The servers.
        work: Windows, (T, H, W, 3) uint8 RGB each, or sequences.
        hold: How many windows, or their answers, may be held at once.
        patience_s: How long to go on without any server.
        stall_s: How long to wait for the next answer of servers that are there.
    """

    def __init__(
        self,
        connections: Sequence[Connection],
        work: Iterable[Image | FrameSequence],
        hold: Callable[[], int],
        patience_s: float,
        stall_s: float,
        trail: Trail,
    ) -> None:
        self.wait_s = 0.0
        """Time spent with nothing to do but wait for an answer."""
        self.resent = 0
        """Windows that had to be sent again because a server was lost or failed."""
        self.retries = 0
        """Windows that were sent again because a server was busy."""
        self.hedged = 0
        """Windows that were sent to another server as well because they were late."""
        self.answers: Answers = queue.SimpleQueue()
        self._connections, self._hold = connections, hold
        self._patience_s, self._stall_s, self._trail = patience_s, stall_s, trail
        self._source = enumerate(work)
        self._is_more = True
        self._in_order: deque[Job] = deque()
        self._again: list[Job] = []
        self._progress_s = self._server_seen_s = awake_s()

    def run(self) -> Iterator[Image]:
        """Yield the answer to every window or sequence, in their order.

        Raises:
            UpscaleError: A server refused a window, or all of them stayed away.
        """
        try:
            while True:
                self._send()
                while self._in_order and (hr := self._in_order[0].hr) is not None:
                    self._in_order.popleft()
                    yield hr
                    self._progress_s = awake_s()  # the caller may have taken its time
                if not (self._in_order or self._is_more) or not self._wait():
                    return
        finally:
            for connection in self._connections:
                connection.cancel(self.answers)

    def _send(self) -> None:
        """Give the servers what they can take."""
        while free := [one for one in self._connections if one.has_room(awake_s())]:
            connection = min(free, key=lambda one: one.load)
            job = self._next_job()
            if job is None:
                late = next(((one, job) for one in free if (job := self._late_job(one))), None)
                if late is None:
                    return
                connection, job = late
                self.hedged += 1
            connection.send(job, self.answers)

    def _next_job(self) -> Job | None:
        """The window to send next: one that has to be sent again, or a new one."""
        while self._again:
            job = heapq.heappop(self._again)
            if job.hr is None:  # or an answer came after all
                return job
        if not self._may_take_new:
            return None
        index, work = next(self._source, (-1, None))
        if work is None:
            self._is_more = False
            return None
        job = Job(index, work, work.size, tag=self._trail.tag(index))
        self._in_order.append(job)
        return job

    @property
    def _may_take_new(self) -> bool:
        return self._is_more and len(self._in_order) < self._hold()

    def _late_job(self, connection: Connection) -> Job | None:
        """The oldest window that is late elsewhere and that this server has not been sent."""
        now_s = awake_s()
        return next((job for job in self._in_order if self._late_at_s(job, connection) <= now_s), None)

    def _late_at_s(self, job: Job, connection: Connection) -> float:
        """When this server may take over a window, by ``awake_s``."""
        if job.hr is not None or len(job.under_way) != 1 or job.under_way[0].connection is connection:
            return float("inf")
        return job.under_way[0].sent_s + connection.late_after_s(job.pixels)

    def _wait(self) -> bool:
        """Wait until something comes or is due, and take in all there is; return False to stop."""
        started_s = awake_s()
        try:
            news = self.answers.get(timeout=max(0.0, self._due_s() - started_s))
            self._note_servers()
            while True:
                if news == STOP:
                    return False
                if not isinstance(news, str):
                    self._take(news)
                news = self.answers.get_nowait()
        except queue.Empty:
            pass
        self.wait_s += awake_s() - started_s
        self._note_servers()
        for connection in self._connections:
            connection.give_up_if_silent()
        self._give_up_if_due()
        return True

    def _due_s(self) -> float:
        """When there is something to do even if nothing comes, by ``awake_s``."""
        due_s = [self._give_up_at_s()]
        for connection in self._connections:
            due_s.append(connection.silent_at_s() or float("inf"))
            free_at_s = connection.free_at_s()
            if free_at_s is None:
                continue
            if self._again or self._may_take_new:
                due_s.append(free_at_s)
            else:
                late_at_s = (self._late_at_s(job, connection) for job in self._in_order)
                late_s = min(late_at_s, default=float("inf"))
                due_s.append(max(late_s, free_at_s))
        return min(due_s)

    def _take(self, news: News) -> None:
        attempt, hr, error = news
        job = attempt.job
        is_awaited = attempt in job.under_way
        if is_awaited:
            job.under_way.remove(attempt)
        if error is None:
            self._progress_s = self._server_seen_s = awake_s()
            if job.hr is None:  # the first answer, be it of an attempt that was given up
                job.hr, job.work = hr, None
                for slower in job.under_way:
                    slower.connection.ask_for_less(slower, is_busy=False)
        elif is_awaited:
            self._take_error(attempt, error)

    def _take_error(self, attempt: Attempt, error: InferenceServerException) -> None:
        job, connection, fault = attempt.job, attempt.connection, fault_of(error)
        if fault is Fault.LOST:
            connection.lose(error.message())
        elif fault in (Fault.BUSY, Fault.MEMORY):
            connection.trouble = error.message()
            connection.ask_for_less(attempt, is_busy=True)
        if job.hr is not None:  # of another server
            return
        if fault is Fault.BUSY:
            self.retries += 1
        else:
            job.failures += 1
            if fault is Fault.REFUSED or job.failures >= MOST_FAILURES:
                what = f"{self._trail.what} {job.index // self._trail.tiles + 1}"
                raise UpscaleError(
                    f"{connection.address} refused {what} of this run: "
                    f"{error.message()}; see request {job.tag.request_id} in the server's log"
                ) from error
            self.resent += 1
        if not job.under_way:
            heapq.heappush(self._again, job)

    def _note_servers(self) -> None:
        if any(one.state is State.UP for one in self._connections):
            self._server_seen_s = awake_s()  # patience starts when the last one is gone

    def _give_up_at_s(self) -> float:
        if any(one.state is State.UP for one in self._connections):
            return self._progress_s + self._stall_s
        if all(one.state is State.LEFT_OUT for one in self._connections):
            return self._progress_s
        return self._server_seen_s + self._patience_s

    def _give_up_if_due(self) -> None:
        now_s = awake_s()
        if now_s < self._give_up_at_s() or not self.answers.empty():
            return
        names = ", ".join(one.address for one in self._connections)
        states = {one.state for one in self._connections}
        trouble = "; ".join(dict.fromkeys(one.trouble for one in self._connections if one.trouble))
        if State.UP in states:
            silent_s = round(now_s - self._progress_s)
            said = f" [{trouble}]" if trouble else ""
            raise ServerError(f"{names} gave no answer for {silent_s} s: see the server's log{said}")
        if states == {State.LEFT_OUT}:
            raise UpscaleError(trouble)
        silent_s = round(now_s - self._server_seen_s)
        raise ServerError(f"lost {names} and found no server for {silent_s} s: {START_HINT} [{trouble}]")
