"""What a group of processes took, from its start on: its most memory, and who else was at work."""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from perf.counters import others_cpu_s, session_memory_mb

INTERVAL_S = 0.1  # what loading a model takes is there for half a second


@dataclass
class Peak:
    """The most so far, in MiB."""

    processes: float = 0.0
    """Of all processes of the session, shared pages counted once."""
    gpu: float | None = None
    """Of the GPU, whoever uses it; None: there is none."""
    others_cores: float = 0.0
    """Processor cores that neither the session nor this process used, on average; known at the end."""

    def look(self, session: int) -> None:
        """Measure once."""
        self.processes = max(self.processes, session_memory_mb(session))
        if (used := gpu_memory_mb()) is not None:
            self.gpu = max(self.gpu or 0.0, used)


@contextmanager
def watched(session: int) -> Iterator[Peak]:
    """Watch the processes of a session."""
    peak, stop = Peak(), threading.Event()
    others_s, started_s = others_cpu_s(session), time.monotonic()

    def watch() -> None:
        while not stop.wait(INTERVAL_S):
            peak.look(session)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
        peak.look(session)
        elapsed_s = time.monotonic() - started_s
        peak.others_cores = max(0.0, round((others_cpu_s(session) - others_s) / elapsed_s, 2))
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
