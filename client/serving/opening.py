"""A session from a list of addresses: what the command line and the library open."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import ExitStack, contextmanager

from ..errors import ServerError
from .addresses import Address, addresses_from_url
from .security import Security
from .server import NO_SECURITY, Server
from .session import Session

log = logging.getLogger(__name__)

DEFAULT_MODEL, STREAM_MODEL = "mst_gan", "mst_gan_stream"
AUTO_MODE = "auto"
MODES = {AUTO_MODE: (STREAM_MODEL, DEFAULT_MODEL), "window": (DEFAULT_MODEL,), "stream": (STREAM_MODEL,)}
"""Which ensemble is taken, the first that a server has: the recurrent one, or that of windows."""
DEFAULT_PATIENCE_S = 60.0
WAIT_FOR_OTHERS_S = 10.0  # once a server is there


@contextmanager
def open_session(
    urls: Iterable[str],
    models: str | tuple[str, ...] = DEFAULT_MODEL,
    security: Security = NO_SECURITY,
    patience_s: float = DEFAULT_PATIENCE_S,
    allow_mixed_weights: bool = False,
) -> Iterator[Session]:
    """Connect to servers of one ensemble, and hang up at the end.

    It begins as soon as all have answered, or some have and the others do not; those join when they do.

    Args:
        urls: gRPC addresses, as ``address_from_url`` reads them.
        models: Names of the ensemble; of several, the first that a server has.
        security: For ``grpcs://`` addresses.
        patience_s: How long to go on without any server.
        allow_mixed_weights: Let servers with different weights answer, frame by frame.

    Raises:
        ServerError: No server is there.
        UpscaleError: One serves something else.
    """
    opener = _Opener(models, security)
    with ExitStack() as stack:
        stack.callback(opener.close)
        servers, absent = opener.open(_addresses_from_urls(urls))
        session = Session(
            _without_twins(servers),
            patience_s=patience_s,
            allow_mixed_weights=allow_mixed_weights,
            absent=absent,
        )
        stack.callback(session.close)
        yield session


def _addresses_from_urls(urls: Iterable[str]) -> list[Address]:
    found: dict[Address, None] = {}
    for url in urls:
        for address in addresses_from_url(url.strip()):
            if address in found:
                log.warning("%s is named twice: it is used once", address.host_port)
            found[address] = None
    return list(found)


def _without_twins(servers: list[Server]) -> list[Server]:
    """Leave out servers that were reached before by another of their names."""
    if len(servers) == 1:
        return servers
    kept: list[Server] = []
    # A server that works for others between two looks at it counts on, so look again for what differs.
    looks = [[server.counters() for server in servers] for _ in range(2)]
    for i, server in enumerate(servers):
        twin = next(
            (servers[j] for j in range(i) if any(look[i] and look[i] == look[j] for look in looks)), None
        )
        if twin:
            log.warning("%s and %s are one server: it is used once", twin.address, server.address)
        else:
            kept.append(server)
    return kept


class _Opener:
    """Connects to servers side by side, and hangs up on all of them at the end."""

    def __init__(self, models: str | tuple[str, ...], security: Security) -> None:
        self._models, self._security = models, security
        self._lock = threading.Lock()
        self._opened: list[Server] | None = []
        """None: closed."""

    def open(self, addresses: list[Address]) -> tuple[list[Server], dict[str, Callable[[], Server]]]:
        """Return the servers that are there, and how to connect to the others, by address."""
        futures = {address: self._in_background(address) for address in addresses}
        wait(futures.values(), WAIT_FOR_OTHERS_S)
        while not any(map(_is_there, futures.values())):
            pending = [future for future in futures.values() if not future.done()]
            if not pending:
                errors = [str(future.exception()) for future in futures.values()]
                raise ServerError("; ".join(errors))
            wait(pending, return_when=FIRST_COMPLETED)
        absent = {}
        for address, future in futures.items():
            if not _is_there(future):
                why = future.exception() if future.done() else f"{address.host_port} has not answered yet"
                log.warning("%s; going on without it until it answers", why)
                absent[address.host_port] = self._later(address, future)
        return [future.result() for future in futures.values() if _is_there(future)], absent

    def _in_background(self, address: Address) -> Future[Server]:
        future: Future[Server] = Future()

        def run() -> None:
            try:
                future.set_result(self._connect(address))
            except BaseException as err:
                future.set_exception(err)

        threading.Thread(target=run, daemon=True).start()
        return future

    def _later(self, address: Address, future: Future[Server]) -> Callable[[], Server]:
        under_way = iter([future.result] if not future.done() else [])

        def connect() -> Server:
            wait_for_it = next(under_way, None)
            return wait_for_it() if wait_for_it else self._connect(address)

        return connect

    def _connect(self, address: Address) -> Server:
        """Connect, and wait for the answer to the probe."""
        server = Server(address, self._models, self._security)
        with self._lock:
            is_open = self._opened is not None
            if self._opened is not None:
                self._opened.append(server)
        if not is_open:
            server.close()
            raise ServerError(f"{address.host_port} answered when nobody waited any more")
        try:
            server.identity()
        except BaseException:
            server.close()
            raise
        return server

    def close(self) -> None:
        """Hang up."""
        with self._lock:
            opened, self._opened = self._opened or [], None
        for server in opened:
            server.close()


def _is_there(future: Future[Server]) -> bool:
    """Whether a server has answered.

    Raises:
        UpscaleError: It serves something else.
    """
    if not future.done():
        return False
    error = future.exception()
    if error is None:
        return True
    if isinstance(error, ServerError):
        return False
    raise error
