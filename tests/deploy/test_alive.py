"""``deploy/alive.py``: green while a server answers, also a busy one, and red when an instance is dead."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from deploy import alive
from deploy.embedded import cleanup
from deploy.embedded.server import TritonServer, free_ports

PATIENCE_S = 60


def run(url: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, alive.__file__, "--url", url, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)


@pytest.mark.server
def test_it_is_red_when_an_instance_was_killed_and_triton_stays_green(
    toy_repository: Path, tmp_path: Path
) -> None:
    with TritonServer(toy_repository, tmp_path / "triton.log") as server:
        healthy = run(server.http_url)
        assert healthy.returncode == 0, healthy.stderr

        prefix = cleanup.region_prefix(server.process.pid)
        instances = cleanup.instances(prefix, server.process.pid)
        generator = next(p for p, _ in instances if "/generator/" in " ".join(p.cmdline()))
        os.kill(generator.pid, signal.SIGKILL)
        dead = run(server.http_url)
        assert dead.returncode == 1
        assert "not healthy" in dead.stderr and len(dead.stderr.splitlines()) == 1
        assert server.get(server.http_url, "/v2/models/mst_gan/ready").status == http.client.OK
        server.process.kill()  # which would wait 30 s for the dead instance


def test_it_is_red_where_nothing_listens() -> None:
    (port,) = free_ports(1)
    result = run(f"127.0.0.1:{port}")
    assert result.returncode == 1 and result.stderr.startswith("not alive: ")


@contextmanager
def busy_server(others: int, status: int, ours: int = 0) -> Iterator[str]:
    """A server that answers ``ours`` first requests, and ``others`` of others each time that it is asked."""
    done, left = 0, ours
    over = threading.Event()

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            nonlocal done
            if self.path.endswith("/stats"):
                body = {"model_stats": [{"inference_stats": {"success": {"count": done}}}]}
                done += others
            else:
                body = {"inputs": [{"name": "lr_window", "datatype": "UINT8", "shape": [-1, 3, -1, -1, 3]}]}
            self.answer(http.client.OK, json.dumps(body))

        def do_POST(self) -> None:
            nonlocal done, left
            if left:
                done, left = done + 1, left - 1
                self.answer(http.client.OK, "{}")
                return
            if not status:
                over.wait(PATIENCE_S)
            self.answer(status or http.client.OK, "{}")

        def answer(self, code: int, text: str) -> None:
            self.send_response(code)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        over.set()
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("status", [0, 429, 503], ids=["no answer in time", "429", "503"])
@pytest.mark.parametrize(("others", "code"), [(1, 0), (0, 1)], ids=["busy", "stalled"])
def test_a_busy_server_is_alive_and_a_stalled_one_is_not(others: int, code: int, status: int) -> None:
    with busy_server(others, status) as url:
        result = run(url, "--timeout", "1")
    assert result.returncode == code, result.stdout + result.stderr
    assert ("busy" in result.stdout) == (code == 0)


def test_its_own_frames_do_not_hide_that_an_instance_stalls() -> None:
    with busy_server(others=0, status=0, ours=3) as url:
        result = run(url, "--timeout", "1")
    assert result.returncode == 1 and "no other frame" in result.stderr
