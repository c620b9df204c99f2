"""``--metrics-port``: what a run has done so far, for Prometheus to scrape."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .errors import UpscaleError
from .progress import Progress
from .serving.connection import State
from .serving.identity import NAME, PRECISION, VERSION
from .serving.session import Session

if TYPE_CHECKING:
    from prometheus_client import Metric

Watch = Callable[[Session], None]


@contextmanager
def serve_metrics(address: tuple[str, int] | None, progress: Progress) -> Iterator[Watch]:
    """Serve metrics over HTTP, at ``/metrics``, until the end of the block.

    Args:
        address: Host and port; None: serve nothing.
        progress: Counts the frames.

    Yields:
        What takes the session once there is one; its metrics appear then.

    Raises:
        UpscaleError: The port is taken, or ``prometheus_client`` is not installed.
    """
    if address is None:
        yield lambda session: None
        return
    try:
        from prometheus_client import CollectorRegistry, start_http_server
    except ImportError as err:
        raise UpscaleError(
            "expected the package prometheus-client for --metrics-port, found none: "
            "pip install prometheus-client"
        ) from err
    registry = CollectorRegistry()
    host, port = address
    try:
        server, thread = start_http_server(port, host, registry)
    except OSError as err:
        raise UpscaleError(
            f"expected a free port for --metrics-port, found {host}:{port} ({err.strerror}): name another"
        ) from err
    try:
        yield lambda session: registry.register(_Collector(session, progress))
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Collector:
    """Reads the numbers of a run at each scrape."""

    def __init__(self, session: Session, progress: Progress) -> None:
        self._session, self._progress = session, progress

    def collect(self) -> Iterable[Metric]:
        """Give all metrics as they are now."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        again = self._session.sent_again()
        for name, value, meaning in (
            ("frames", self._progress.frames, "Frames written."),
            ("retries", again.retries, "Windows sent again because a server was busy."),
            ("resent_windows", again.resent, "Windows sent again because a server was lost or failed."),
            ("hedged_windows", again.hedged, "Windows sent to a second server because they were late."),
        ):
            yield CounterMetricFamily(f"mst_gan_client_{name}", meaning, value)
        for name, amount, meaning in (
            ("frames_per_second", self._progress.fps(), "Frames written per second since the clip began."),
            ("bytes_in_flight", self._session.bytes_in_flight, "Windows sent and not answered yet."),
        ):
            yield GaugeMetricFamily(f"mst_gan_client_{name}", meaning, amount)
        up = GaugeMetricFamily(
            "mst_gan_client_server_up", "1: the server can be asked; 0: it is lost.", labels=["server"]
        )
        info = GaugeMetricFamily(
            "mst_gan_client_server_info",
            "What each server publishes about its weights.",
            labels=["server", "version", "weights", "precision"],
        )
        for address, state, published in self._session.servers():
            up.add_metric([address], float(state is State.UP))
            if published:
                info.add_metric(
                    [address, *(published.get(name, "") for name in (VERSION, NAME, PRECISION))], 1
                )
        yield up
        yield info
