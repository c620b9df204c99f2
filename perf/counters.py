"""What the server says of itself: Prometheus text in, averages per request and per stage out."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

# name="..." pairs may come in any order.
SAMPLE = re.compile(r'^nv_inference_(\w+)\{[^}]*model="([^"]+)"[^}]*\} (\S+)$', re.MULTILINE)
TIMES = {
    "queue_ms": "queue_duration_us",
    "input_ms": "compute_input_duration_us",
    "infer_ms": "compute_infer_duration_us",
    "output_ms": "compute_output_duration_us",
}

NO_SESSION = -1  # only this process and its children are ours

Counters = dict[tuple[str, str], float]


def parse(text: str) -> Counters:
    """(model, counter) -> value; versions and reasons are added up."""
    counters: Counters = {}
    for counter, model, value in SAMPLE.findall(text):
        counters[model, counter] = counters.get((model, counter), 0) + float(value)
    return counters


def stages(before: Counters, after: Counters, models: list[str]) -> dict[str, dict[str, float]]:
    """Per model what happened in between: mean batch, and mean milliseconds of a request in each phase.

    ``nv_inference_exec_count`` counts runs of the model, so requests over runs is the batch really achieved.
    """
    result = {}
    for model in models:
        delta = _difference(before, after, model)
        requests, runs = delta.get("request_success", 0), delta.get("exec_count", 0)
        if requests and runs:
            result[model] = {
                "batch": round(delta["count"] / runs, 3),
                **{name: round(delta[source] / requests / 1000, 3) for name, source in TIMES.items()},
            }
    return result


def _difference(before: Counters, after: Counters, model: str) -> Mapping[str, float]:
    return {
        counter: value - before.get((name, counter), 0)
        for (name, counter), value in after.items()
        if name == model
    }


def session_memory_mb(session: int) -> float:
    """Memory of all processes of a session, shared pages counted once."""
    total_kb = 0
    for text in _session_files(session, "smaps_rollup"):
        match = re.search(r"^Pss:\s+(\d+)", text, re.MULTILINE)
        total_kb += int(match[1]) if match else 0
    return round(total_kb / 1024, 1)


def others_cpu_s(session: int) -> float:
    """Processor seconds since boot, but those of this process, its children and a session: the noise."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    ticks = user + nice + system + irq + softirq + steal
    for text in _session_files(session, "stat"):
        # The second field is a name in brackets that may hold anything.
        utime, stime = text.rpartition(")")[2].split()[11:13]
        ticks -= int(utime) + int(stime)
    return ticks / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])


class NoiseWatch:
    """Watches what other programs do to the processors from its making on."""

    def __init__(self, session: int | None) -> None:
        """None: a server whose processes we cannot tell from others'."""
        self.session = session
        self.started_s = time.monotonic()
        self.before_s = 0.0 if session is None else others_cpu_s(session)

    def others_cores(self) -> float | None:
        """Cores that neither the session nor this process and its children used, on average."""
        if self.session is None:
            return None
        used_s = others_cpu_s(self.session) - self.before_s
        return max(0.0, round(used_s / (time.monotonic() - self.started_s), 2))


def _session_files(session: int, name: str) -> Iterator[str]:
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(process.name)) == session:
                yield (process / name).read_text()
        except OSError:
            continue  # ended meanwhile
