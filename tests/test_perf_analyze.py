"""perf_analyzer's command line and its answers; what the server and the system say meanwhile."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_perf_sweep import metrics

from perf import analyze, counters
from perf.analyze import Target
from perf.errors import PerfError
from perf.plan import Point, Sweep
from perf.tools import Analyzer
from perf.variant import Serving

TARGET = Target("localhost:1", "mst_gan", Path("in.json"), 1000)


def test_closed_loop_command() -> None:
    point = Point(Serving(), (180, 320), batch=4, concurrency=6, transport="system")

    words = analyze.arguments(Sweep("one", "?", frames=16), point, TARGET, None)

    assert words[:8] == ["-m", "mst_gan", "-i", "grpc", "-u", "localhost:1", "-b", "4"]
    assert {"--concurrency-range=6", "--shared-memory=system", "--output-shared-memory-size=1000"} <= set(
        words
    )
    assert "--measurement-mode=count_windows" in words
    assert "--measurement-request-count=6" in words  # 16 frames are 4 requests, but 6 are in flight
    assert not any("profile-export" in word for word in words)  # it would write every frame as JSON numbers


def test_open_loop_command() -> None:
    point = Point(Serving(), (180, 320), batch=1, concurrency=8, transport="grpc", load=0.5)

    words = analyze.arguments(Sweep("one", "?", frames=16), point, TARGET, 3.25)

    assert {"--request-rate-range=3.25", "--request-distribution=poisson"} <= set(words)
    assert not any("concurrency" in word or "shared-memory" in word for word in words)


def put_analyzer(tmp_path: Path, body: str) -> Analyzer:
    """A stand-in that may answer by ``$*``; the CSV is what perf_analyzer 2.51.0 writes."""
    path = tmp_path / "perf_analyzer"
    csv = (
        "Concurrency,Inferences/Second,Server Queue,p50 latency,p90 latency,p95 latency,p99 latency\n"
        "4,20.5,2,36795,51250,60076,79175\n"
    )
    (tmp_path / "sample.csv").write_text(csv)
    path.write_text(f"#!/bin/sh\nfor last; do :; done\n{body}\ncp {tmp_path}/sample.csv $last\n")
    path.chmod(0o755)
    return Analyzer(path, tmp_path, "1")


def passes(*fps: float) -> str:
    """What perf_analyzer says of its windows."""
    lines = [f"  Pass [{n}] throughput: {one} infer/sec. p95 latency: 9 usec" for n, one in enumerate(fps, 1)]
    return "\n".join(f'echo "{line}"' for line in lines)


@pytest.mark.parametrize(("last", "is_stable"), [(22.0, True), (28.0, False)])
def test_figures_are_read_and_unstable_ones_marked(tmp_path: Path, last: float, is_stable: bool) -> None:
    """The first window, in which requests build up, counts in neither."""
    analyzer = put_analyzer(tmp_path, passes(5.0, 20.0, last) + '\necho "    Request count: 33"')
    point = Point(Serving(), (180, 320), 1, 4, "grpc")

    found = analyze.measure(analyzer, Sweep("one", "?"), point, TARGET, None)

    assert found.is_stable is is_stable
    assert (found.fps, found.requests) == ((20.0 + last) / 2, 33)
    assert found.windows_fps == (5.0, 20.0, last)
    assert found.latency_ms == {"p50": 36.8, "p90": 51.25, "p95": 60.08, "p99": 79.17}


def test_failure_and_silence_of_perf_analyzer(tmp_path: Path) -> None:
    point = Point(Serving(), (180, 320), 1, 4, "grpc")
    broken = put_analyzer(tmp_path, "echo 'usage'; echo 'error: no connection' >&2; exit 99")
    with pytest.raises(PerfError, match="status 99: error: no connection"):
        analyze.measure(broken, Sweep("one", "?"), point, TARGET, None)
    other = put_analyzer(tmp_path, passes(5.0, 20.0))
    with pytest.raises(PerfError, match="status 0: no reason"):
        analyze.measure(other, Sweep("one", "?"), point, TARGET, None)
    silent = put_analyzer(tmp_path, "exec sleep 60")
    with pytest.raises(PerfError, match="did not end in 1 s"):
        analyze.measure(silent, Sweep("one", "?", timeout_s=1), point, TARGET, None)


def test_stages_between_two_looks_at_the_server() -> None:
    before, after = counters.parse(metrics(10)), counters.parse(metrics(30))

    found = counters.stages(before, after, ["generator", "idle"])

    times = {"queue_ms": 5.0, "input_ms": 1.0, "infer_ms": 20.0, "output_ms": 0.5}
    assert found == {"generator": {"batch": 4.0, **times}}


def test_own_memory_is_found() -> None:
    assert counters.session_memory_mb(os.getsid(0)) > 10


def test_work_of_others_is_counted_and_that_of_a_session_is_not() -> None:
    loop = "import time\nwhile time.process_time() < 0.6: pass\nprint(flush=True)\ninput()"
    command = [sys.executable, "-c", loop]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, start_new_session=True) as busy:
        before = {session: counters.others_cpu_s(session) for session in (busy.pid, -1)}
        assert busy.stdout
        busy.stdout.readline()  # it has worked
        after = {session: counters.others_cpu_s(session) for session in before}
        busy.communicate(b"\n")

    seen, ignored = (after[session] - before[session] for session in (-1, busy.pid))
    assert seen - ignored > 0.2
