"""Stages of a pipeline side by side: each on its own thread, a few items ahead of the next."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import TypeVar

Item = TypeVar("Item")

POLL_S = 0.1
CLOSE_WITHIN_S = 5.0


@dataclass
class Stage:
    """How long one stage of the run was at work."""

    busy_s: float = 0.0

    def timed(self, items: Iterator[Item]) -> Generator[Item]:
        """Pass items on, and count the time it took to get each."""
        while True:
            started_s = time.monotonic()
            try:
                item = next(items)
            except StopIteration:
                return
            finally:
                self.busy_s += time.monotonic() - started_s
            yield item


class Prefetch(Iterator[Item]):
    """Runs an iterator on a thread of its own, at most ``depth`` items ahead of its reader.

    The reader sees the same items, and the same error if there is one.
    """

    def __init__(self, items: Iterator[Item], depth: int) -> None:
        self._items = items
        self._ready: queue.Queue[Item] = queue.Queue(depth)
        self._failure: BaseException | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for item in self._items:
                while not self._closed.is_set():
                    try:
                        self._ready.put(item, timeout=POLL_S)
                        break
                    except queue.Full:
                        continue
                else:
                    return
        except BaseException as err:  # raised again on the reader's thread
            self._failure = err

    def __next__(self) -> Item:
        """Wait for the next item."""
        while not self._closed.is_set():
            running = self._thread.is_alive()  # asked first: a thread that ends now has put all it had
            try:
                return self._ready.get(timeout=POLL_S) if running else self._ready.get_nowait()
            except queue.Empty:
                if not running:
                    break
        if self._failure and not self._closed.is_set():
            raise self._failure
        raise StopIteration

    def close(self) -> None:
        """Stop early: the reader sees the end, and the thread gets a moment to leave."""
        self._closed.set()
        self._thread.join(CLOSE_WITHIN_S)
