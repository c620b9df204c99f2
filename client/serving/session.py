"""Windows or sequences in, hr frames out, in order: what is under way at one or many Triton servers."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..errors import UpscaleError
from ..frames.sequences import FrameSequence
from ..frames.windows import Image
from .connection import Connection, ServerProtocol, State
from .dispatch import STOP, WAKE, Dispatch
from .identity import Identity, different_releases, different_servers
from .trail import Trail
from .transports import AUTO

Connect = Callable[[], ServerProtocol]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SentAgain:
    """How many windows were sent more than once, and why."""

    retries: int
    """A busy server refused."""
    resent: int
    """A server was lost or failed."""
    hedged: int
    """Late at one server, and sent to another as well."""

    def plus(self, retries: int, resent: int, hedged: int) -> SentAgain:
        """Add those of another round."""
        return SentAgain(self.retries + retries, self.resent + resent, self.hedged + hedged)


class Session:
    """Shares windows over servers that hold the same ensemble, and hands the answers back in order.

    Windows are stateless: one whose server dies is sent again, to that server once it is back or to
    another. At most twice the requests in flight are held in memory, or what ``limit`` says.

    Args:
        servers: At least one; all with the same contract.
        patience_s: How long to go on without any server.
        stall_s: How long to wait for the next answer of servers that are there.
        allow_mixed_weights: Let servers with different weights answer, frame by frame.
        absent: Servers that do not answer yet, by address, and how to connect to them; they take their
            share once they do.

    Raises:
        UpscaleError: The servers differ.
    """

    def __init__(
        self,
        servers: Sequence[ServerProtocol],
        patience_s: float = 60.0,
        stall_s: float = 900.0,
        allow_mixed_weights: bool = False,
        absent: Mapping[str, Connect] | None = None,
    ) -> None:
        self.contract = servers[0].contract
        self._patience_s, self._stall_s = patience_s, stall_s
        self._allow_mixed_weights = allow_mixed_weights
        self._lock = threading.Lock()
        self._wanted: tuple[tuple[int, ...], str] | None = None
        """The shape and the transport to agree upon with every server."""
        self._most_held: int | None = None
        self.trail = Trail.new()
        """Names the requests of the next round."""
        self._dispatch: Dispatch | None = None
        self._sent_again = SentAgain(0, 0, 0)
        self._first = servers[0]
        for server in servers[1:]:
            self._check_contract(server)
        weights = {one.address: one.identity() for one in servers} if len(servers) > 1 else {}
        different = different_servers(weights) if weights and not allow_mixed_weights else None
        if different:
            raise UpscaleError(
                f"expected the same weights everywhere, found that {different}; "
                "name servers of one model with --url, or pass --allow-mixed-weights"
            )
        releases = different_releases(weights)
        if releases:
            log.warning("the servers' models are of different releases: %s", releases)
        self._connections = [
            Connection(server.address, server, self._admit, self._wake) for server in servers
        ]
        for address, connect in (absent or {}).items():
            self._connections.append(Connection(address, None, self._admit, self._wake, connect))

    @property
    def in_flight(self) -> int:
        """Requests that keep all servers busy."""
        return sum(connection.capacity for connection in self._connections)

    @property
    def wait_s(self) -> float:
        """Time that the last round of windows spent with nothing to do but wait for an answer."""
        return self._dispatch.wait_s if self._dispatch else 0.0

    @property
    def resent(self) -> int:
        """Windows of the last round that had to be sent again."""
        return self._dispatch.resent if self._dispatch else 0

    @property
    def hedged(self) -> int:
        """Windows of the last round that were late, and sent to another server as well."""
        return self._dispatch.hedged if self._dispatch else 0

    def sent_again(self) -> SentAgain:
        """Windows of all rounds so far that were sent more than once."""
        with self._lock:
            now = self._dispatch
            return self._sent_again.plus(now.retries, now.resent, now.hedged) if now else self._sent_again

    @property
    def bytes_in_flight(self) -> int:
        """Of windows that were sent and not answered yet."""
        return sum(connection.bytes_in_flight for connection in self._connections)

    def servers(self) -> list[tuple[str, State, Mapping[str, str]]]:
        """Address, state, and what it publishes about its weights, of every server."""
        return [
            (one.address, one.state, one.server.identity().published if one.server else {})
            for one in self._connections
        ]

    def limit(self, windows: int) -> None:
        """Hold at most so many windows, or answers that wait for their turn, from the next round on.

        Args:
            windows: At least 1. Fewer than the requests that keep all servers busy are shared out over them;
                shared memory that is set up after this has room for no more.
        """
        self._most_held = windows
        for connection in self._connections:
            self._limit_one(connection)

    def _limit_one(self, connection: Connection) -> None:
        """Give one server its share of what may be held."""
        if self._most_held is not None and connection.server:
            connection.limit(-(-connection.capacity * self._most_held // self.in_flight))

    def weights(self) -> dict[str, Identity]:
        """What weights each server has that has been used so far, by its address."""
        return {one.address: one.server.identity() for one in self._connections if one.server}

    def share_memory(self, lr_shape: tuple[int, ...], transport: str = AUTO) -> str:
        """Use shared memory for windows of this shape where it can be; return how they pass, and why."""
        with self._lock:
            self._wanted = lr_shape, transport
        ways = [self._share(one, self._wanted) for one in self._connections if one.state is State.UP]
        return "; ".join(dict.fromkeys(ways)) or "nothing yet: no server is there"

    @staticmethod
    def _share(connection: Connection, wanted: tuple[tuple[int, ...], str]) -> str:
        assert connection.server
        way = connection.server.share_memory(*wanted)
        connection.shared = wanted
        return way

    def hr_frames(self, work: Iterable[Image | FrameSequence]) -> Iterator[Image]:
        """Yield the answer to every window or sequence, in their order.

        Args:
            work: Windows, (T, H, W, 3) uint8 RGB each, or sequences for a recurrent model; read only as far
                ahead as requests are in flight.

        Yields:
            (H * scale, W * scale, 3) uint8 RGB; of a sequence with an axis of frames before.

        Raises:
            UpscaleError: A server refused a window, or all of them stayed away.
        """
        dispatch = Dispatch(
            self._connections,
            work,
            lambda: self._most_held or 2 * self.in_flight,
            self._patience_s,
            self._stall_s,
            self.trail,
        )
        before = self.sent_again()
        with self._lock:
            self._sent_again, self._dispatch = before, dispatch
        yield from dispatch.run()

    def stop(self) -> None:
        """End the windows under way, from another thread than the one that may be waiting for them."""
        if self._dispatch:
            self._dispatch.answers.put(STOP)

    def close(self) -> None:
        """End the search for servers that are not there."""
        for connection in self._connections:
            connection.close()

    def _wake(self) -> None:
        if self._dispatch:
            self._dispatch.answers.put(WAKE)

    def _admit(self, connection: Connection) -> None:
        """Let a server in that was not there, or not any more."""
        server = connection.server
        assert server
        self._check_contract(server)
        weights = {one.address: one.identity() for one in (self._first, server)}
        different = None if self._allow_mixed_weights else different_servers(weights)
        if different:
            raise UpscaleError(different)
        self._limit_one(connection)
        while True:
            with self._lock:
                wanted = self._wanted
                if wanted is None or connection.shared == wanted:
                    connection.state = State.UP
                    return
            self._share(connection, wanted)

    def _check_contract(self, server: ServerProtocol) -> None:
        if server.contract != self.contract:
            raise UpscaleError(
                f"expected one ensemble everywhere, found that {server.address} serves another "
                f"{self.contract.model!r} than {self._first.address}: "
                "give --url only servers with the same model repository, or name what all have with --mode"
            )
