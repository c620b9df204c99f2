"""The most memory that a group of processes had while something was going on."""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from perf.counters import session_memory_mb

INTERVAL_S = 0.25


@dataclass
class Peak:
    """The most so far, in MiB."""

    processes: float = 0.0
    """Of all processes of the session, shared pages counted once."""
    gpu: float | None = None
    """Of the GPU, whoever uses it; None: there is none."""

    def look(self, session: int) -> None:
        """Measure once."""
        self.processes = max(self.processes, session_memory_mb(session))
        if (used := gpu_memory_mb()) is not None:
            self.gpu = max(self.gpu or 0.0, used)


@contextmanager
def watched(session: int) -> Iterator[Peak]:
    """Watch the processes of a session."""
    peak, stop = Peak(), threading.Event()

    def watch() -> None:
        while not stop.wait(INTERVAL_S):
            peak.look(session)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
        peak.look(session)
    finally:
        stop.set()
        thread.join()


def gpu_memory_mb() -> float | None:
    """Memory in use on the first GPU, or None."""
    if not shutil.which("nvidia-smi"):
        return None
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    run = subprocess.run(query, capture_output=True, text=True)
    return float(run.stdout.splitlines()[0]) if run.returncode == 0 and run.stdout else None
