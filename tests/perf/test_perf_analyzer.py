"""perf_analyzer's command line and answers, and what the server and the system say meanwhile."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from perf import analyzer
from perf.analyzer import Analyzer, Load
from perf.machine import Watch
from perf.results import PerfError

LOAD = Load("localhost:1", "mst_gan", Path("in.json"), 1000)


def test_requests_in_flight() -> None:
    words = replace(LOAD, batch=4, concurrency=6, transport="system", frames=16).arguments()

    assert words[:8] == ["-m", "mst_gan", "-i", "grpc", "-u", "localhost:1", "-b", "4"]
    assert {"--concurrency-range=6", "--shared-memory=system", "--output-shared-memory-size=1000"} <= {*words}
    assert "--measurement-request-count=6" in words  # 16 frames are 4 requests, but 6 are in flight


@pytest.mark.parametrize("arrivals", ["constant", "poisson"])
def test_frames_at_a_rate(arrivals: str) -> None:
    words = replace(LOAD, batch=2, rate_fps=48.0, arrivals=arrivals).arguments()

    assert {"--request-rate-range=24", f"--request-distribution={arrivals}"} <= {*words}
    assert not any("concurrency" in word or "shared-memory" in word for word in words)


def put_analyzer(folder: Path, script: str) -> Analyzer:
    (folder / "bin").mkdir()
    path = folder / "bin/perf_analyzer"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return Analyzer(path, folder / "lib")


def answers(folder: Path, *fps: float) -> str:
    """A stand-in's script: what perf_analyzer 2.51.0 prints and writes for windows of these rates."""
    csv = "Concurrency,p50 latency,p90 latency,p95 latency,p99 latency\n4,36795,51250,60076,79175\n"
    (folder / "sample.csv").write_text(csv)
    lines = [f"echo '  Pass [{n}] throughput: {one} infer/sec. p95'" for n, one in enumerate(fps, 1)]
    copy = f"for last; do :; done; cp {folder}/sample.csv $last"
    return "\n".join([*lines, "echo '    Request count: 33'", copy])


@pytest.mark.parametrize(("last", "stable"), [(22.0, True), (28.0, False)])
def test_figures_are_read_and_unstable_ones_marked(tmp_path: Path, last: float, stable: bool) -> None:
    """The first window, in which requests build up, counts in neither."""
    found = put_analyzer(tmp_path, answers(tmp_path, 5.0, 20.0, last)).measure(LOAD)

    assert (found["fps"], found["requests"], found["stable"]) == ((20.0 + last) / 2, 33, stable)
    assert found["windows_fps"] == [5.0, 20.0, last]
    assert (found["p50_ms"], found["p95_ms"], found["p99_ms"]) == (36.8, 60.08, 79.17)


@pytest.mark.parametrize(
    ("script", "message"),
    [("echo 'error: no connection' >&2; exit 99", "status 99: error: no connection"),
     ("exit 0", "status 0: it gave no reason"), ("exec sleep 60", "did not end in 1 s")],
)  # fmt: skip
def test_what_goes_wrong_is_one_line(tmp_path: Path, script: str, message: str) -> None:
    with pytest.raises(PerfError, match=message):
        put_analyzer(tmp_path, script).measure(replace(LOAD, timeout_s=1 if "sleep" in script else 60))


def test_a_missing_or_broken_perf_analyzer_says_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(PerfError, match="found none: run `make perf-tools`"):
        analyzer.find_analyzer(tmp_path)
    put_analyzer(tmp_path, "echo 'libssl.so.3: cannot open' >&2; exit 127")
    with pytest.raises(
        PerfError, match=r"libssl\.so\.3: cannot open; run `make perf-tools` again, or install"
    ):
        analyzer.find_analyzer(tmp_path)


def metrics(requests: int) -> str:
    lines = []
    for name, value in (
        ("request_success", requests), ("count", 2 * requests), ("exec_count", requests / 2),
        ("queue_duration_us", 5000 * requests), ("compute_input_duration_us", 1000 * requests),
        ("compute_infer_duration_us", 20000 * requests), ("compute_output_duration_us", 500 * requests),
    ):  # fmt: skip
        lines.append(f"# TYPE nv_inference_{name} counter")
        lines.append(f'nv_inference_{name}{{model="generator",version="1"}} {value}')
    return "\n".join([*lines, 'nv_gpu_utilization{gpu_uuid="GPU-1"} 0', ""])


def test_phases_and_batch_of_a_stage_between_two_looks_at_the_server() -> None:
    found = analyzer.stages(metrics(10), metrics(30), ["generator", "idle"])

    times = {"queue_ms": 5.0, "input_ms": 1.0, "infer_ms": 20.0, "output_ms": 0.5}
    assert found == {"generator": {"batch": 4.0, **times}}


def test_a_watch_tells_a_process_from_others() -> None:
    loop = "import time\nwhile time.process_time() < 0.6: pass\nprint(flush=True)\ninput()"
    pipe = subprocess.PIPE
    with (
        subprocess.Popen([sys.executable, "-c", loop], stdin=pipe, stdout=pipe) as busy,
        Watch(busy.pid) as watching,
        Watch() as ignoring,
    ):
        assert busy.stdout
        busy.stdout.readline()  # it has worked
        own = sum(psutil.Process(busy.pid).cpu_times()[:2])
        missed_s = ignoring._others_s() - watching._others_s()
        memory_mb = watching.lap()["memory_mb"]
        busy.communicate(b"\n")

    assert missed_s == pytest.approx(own, abs=0.5)
    assert memory_mb and memory_mb > 1
