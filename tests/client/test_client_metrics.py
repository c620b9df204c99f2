"""``--metrics-port``: what Prometheus reads from a run, and what is said where it cannot be served."""

from __future__ import annotations

import socket
import sys
import urllib.request

import grpc
import pytest
from client_fakes import FakeTriton, ensemble_config, pictures, run_client, write_clip
from prometheus_client.parser import text_string_to_metric_families

FRAMES, FRAME_BYTES = 20, 3 * 32 * 48 * 3
IN_FLIGHT = 16  # of a client, at a server with batches of 4 and two instances
BUSY_REQUEST, LOST_REQUEST = 2, 4


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def scrape(port: int) -> dict[str, list[tuple[dict[str, str], float]]]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name.removeprefix("mst_gan_client_"), []).append(
                (sample.labels, sample.value)
            )
    return found


def test_metrics_of_a_run(tmp_path):
    port = free_port()
    seen = {}

    def look(count: int) -> None:
        if count == FRAMES + 2:  # the last, for two were sent again
            seen.update(scrape(port))

    def fail(count: int) -> tuple[grpc.StatusCode, str] | None:
        if count == BUSY_REQUEST:
            return grpc.StatusCode.UNAVAILABLE, "Exceeds maximum queue size"
        return (grpc.StatusCode.INTERNAL, "failed to allocate") if count == LOST_REQUEST else None

    published = {"version": "0.9.0", "weights_name": "some", "precision": "int8"}
    clip = write_clip(tmp_path / "in.mp4", pictures(FRAMES))
    with FakeTriton(config=ensemble_config(**published), before_answer=look, failure=fail) as triton:
        result = run_client(clip, tmp_path / "out.mp4", "--url", triton.url, "--metrics-port", port)
        assert result.exit_code == 0, result.output
        assert seen["retries_total"] == [({}, 1)]
        assert seen["resent_windows_total"] == [({}, 1)]
        assert seen["hedged_windows_total"] == [({}, 0)]
        in_flight = seen["bytes_in_flight"][0][1] / FRAME_BYTES
        assert in_flight == int(in_flight) and 1 <= in_flight <= IN_FLIGHT
        assert 0 <= seen["frames_total"][0][1] < FRAMES and seen["frames_per_second"][0][1] >= 0
        assert seen["server_up"] == [({"server": triton.url}, 1)]
        labels = {"server": triton.url, "version": "0.9.0", "weights": "some", "precision": "int8"}
        assert seen["server_info"] == [(labels, 1)]
    with pytest.raises(OSError):
        scrape(port)  # it has ended with the run


def test_counts_go_on_over_the_clips_of_a_folder(tmp_path):
    """Counters that fell with every clip would look like restarts to Prometheus."""
    port, seen = free_port(), {}

    def fail(count: int) -> tuple[grpc.StatusCode, str] | None:
        if count == 8:
            seen.update(scrape(port))
        return (grpc.StatusCode.UNAVAILABLE, "Exceeds maximum queue size") if count == 1 else None

    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        write_clip(tmp_path / "in" / f"{name}.mp4", pictures(4))
    with FakeTriton(failure=fail) as triton:
        result = run_client(tmp_path / "in", tmp_path / "out", "--url", triton.url, "--metrics-port", port)
        assert result.exit_code == 0, result.output
    assert seen["retries_total"] == [({}, 1)]  # of the first clip, asked in the second
    assert 4 <= seen["frames_total"][0][1] < 8


def test_a_taken_port_is_said_before_the_first_frame(tmp_path, triton):
    clip = write_clip(tmp_path / "in.mp4", pictures(3))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        result = run_client(clip, tmp_path / "out.mp4", "--url", triton.url, "--metrics-port", port)
    assert result.exit_code == 1
    (line,) = result.output.splitlines()
    assert line.startswith(f"Error: expected a free port for --metrics-port, found 127.0.0.1:{port} (")
    assert (triton.probes, triton.requests) == (0, 0) and not (tmp_path / "out.mp4").exists()


def test_a_missing_package_is_said(tmp_path, triton, monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    clip = write_clip(tmp_path / "in.mp4", pictures(3))
    result = run_client(clip, tmp_path / "out.mp4", "--url", triton.url, "--metrics-port", free_port())
    assert result.exit_code == 1 and triton.probes == 0
    assert result.output.splitlines()[0].endswith("found none: pip install prometheus-client")
    assert run_client(clip, tmp_path / "out.mp4", "--url", triton.url).exit_code == 0  # not needed


@pytest.mark.parametrize("wrong", ["0", "70000", "http", "1.2.3.4:"])
def test_what_is_no_port(tmp_path, wrong):
    result = run_client("in.mp4", tmp_path / "out.mp4", "--metrics-port", wrong)
    assert result.exit_code == 2 and "expected a port such as 8003" in result.output
