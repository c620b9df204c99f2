"""A server that somebody else has started, in NVIDIA's container say: measured as it is."""

from __future__ import annotations

import http.client
from dataclasses import dataclass

from perf.errors import PerfError


@dataclass(frozen=True)
class RunningServer:
    """Answers like ``TritonServer``, but is neither started nor stopped here."""

    grpc_url: str
    metrics_url: str
    """``host:port``, as ``grpc_url``."""

    def metrics(self) -> str:
        """All metrics, as Prometheus reads them.

        Raises:
            PerfError: Nobody answers there.
        """
        connection = http.client.HTTPConnection(self.metrics_url, timeout=10)
        try:
            connection.request("GET", "/metrics")
            return connection.getresponse().read().decode()
        except OSError as err:
            raise PerfError(
                f"expected Triton's metrics at {self.metrics_url}, found: {err}; start the server or pass "
                "--metrics-url"
            ) from err
        finally:
            connection.close()

    def ready(self) -> bool:
        """Whether it answers."""
        try:
            return bool(self.metrics())
        except PerfError:
            return False
