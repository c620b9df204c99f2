"""The embedded Triton server as a context manager."""

from __future__ import annotations

import http.client
import json
import logging
import os
import secrets
import shlex
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from deploy.embedded import cleanup
from deploy.embedded.launcher import OWNER_VARIABLE

POLL_S = 0.1
ATTEMPTS = 3  # to find ports that nobody takes before Triton does
PORT_TAKEN = "already in use"  # in Triton's log
STOP_TIMEOUT_S = 40  # Triton gives requests in flight 30 s to end, then leaves by itself
LOG_TAIL_LINES = 30

log = logging.getLogger(__name__)


class ServerError(Exception):
    """The server did not become ready; the text ends with the last lines of its log."""


class TritonServer:
    """The embedded server on free loopback ports, ready inside ``with`` and stopped after it.

    It is killed when this process ends without stopping it, killed itself or not.

    ``grpc_url``, ``http_url`` and ``metrics_url`` are ``host:port``, as Triton's clients take them.
    """

    def __init__(
        self, repository: Path, log_file: Path, *arguments: str, start_timeout_s: float = 120
    ) -> None:
        """Choose ports; nothing runs yet.

        Args:
            repository: The model repository to serve.
            log_file: Where all output of the server goes.
            arguments: More ``tritonserver`` arguments.
            start_timeout_s: Seconds in which every model must be loaded and warm.
        """
        self.log_file = log_file
        self.start_timeout_s = start_timeout_s
        self._id = secrets.token_hex(8)
        self._arguments = [f"--model-repository={repository}", f"--id={self._id}"], arguments
        self._choose_ports()

    def _choose_ports(self) -> None:
        http_port, grpc_port, metrics_port = free_ports(3)
        self.http_url = f"127.0.0.1:{http_port}"
        self.grpc_url = f"127.0.0.1:{grpc_port}"
        self.metrics_url = f"127.0.0.1:{metrics_port}"
        first, last = self._arguments
        self.command = [
            str(Path(sys.executable).with_name("tritonserver")),
            *first,
            f"--http-port={http_port}",
            f"--grpc-port={grpc_port}",
            f"--metrics-port={metrics_port}",
            *last,
        ]

    def start(self) -> None:
        """Start the process without waiting until it is ready; ``with`` waits."""
        log.info("%s > %s", shlex.join(self.command), self.log_file)
        with ExitStack() as stack:
            environment = dict(os.environ)
            pidfds = cleanup.own_pidfd()
            for pidfd in pidfds:
                stack.callback(os.close, pidfd)
                environment[OWNER_VARIABLE] = str(pidfd)
            self.process = subprocess.Popen(
                self.command,
                stdout=stack.enter_context(self.log_file.open("wb")),
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches this process alone, which then stops the server
                pass_fds=pidfds,
                env=environment,
            )

    def __enter__(self) -> TritonServer:
        """Start the server, unless it runs, and wait until it is ready.

        Raises:
            ServerError: It ended, or was not ready in time.
        """
        if "process" not in vars(self) or self.process.poll() is not None:
            self.start()
        deadline = time.monotonic() + self.start_timeout_s
        attempts = 1
        try:
            while not self.ready():
                if (status := self.process.poll()) is not None:
                    if PORT_TAKEN not in self.log_tail() or attempts == ATTEMPTS:
                        raise ServerError(f"tritonserver ended with status {status}:\n{self.log_tail()}")
                    attempts += 1
                    self._choose_ports()
                    self.start()
                if time.monotonic() > deadline:
                    raise ServerError(
                        f"tritonserver not ready in {self.start_timeout_s:g} s:\n{self.log_tail()}"
                    )
                time.sleep(POLL_S)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the server."""
        self.stop()

    def stop(self) -> int:
        """Stop the server, kill it if it does not end in time, clean up, and return its exit status."""
        self.process.terminate()
        try:
            status = self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
        cleanup.clean(cleanup.region_prefix(self.process.pid), self.process.pid)
        return status

    def shm_regions(self) -> list[Path]:
        """Shared memory of the server's model instances."""
        return cleanup.regions(cleanup.region_prefix(self.process.pid))

    def ready(self) -> bool:
        """Whether this server and all its models answer, and its metrics, which Triton opens last."""
        try:
            return (
                self.get(self.http_url, "/v2/health/ready").status == http.client.OK
                and json.load(self.get(self.http_url, "/v2"))["name"] == self._id
                and self.get(self.metrics_url, "/metrics").status == http.client.OK
            )
        except (OSError, http.client.HTTPException, ValueError, LookupError):
            return False  # not there yet, or somebody else took the port

    def metrics(self) -> str:
        """All metrics, as Prometheus reads them."""
        return self.get(self.metrics_url, "/metrics").read().decode()

    def log_tail(self) -> str:
        """The last lines of the server's log."""
        return "\n".join(self.log_file.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:])

    @staticmethod
    def get(url: str, path: str) -> http.client.HTTPResponse:
        """Answer to a GET; proxies of the environment play no part on loopback."""
        connection = http.client.HTTPConnection(url, timeout=10)
        connection.request("GET", path)
        return connection.getresponse()


def free_ports(count: int) -> list[int]:
    """Different ports of the loopback interface that nobody listens on."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
