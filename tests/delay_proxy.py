"""A TCP proxy that is far away, loses packets, falls silent or breaks connections."""

from __future__ import annotations

import asyncio
import math
import random
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress

PACKET_BYTES = 1448  # of a TCP segment on Ethernet
CHUNK_BYTES = 1 << 16


class Proxy:
    """Passes TCP connections on to a port of this machine, inside ``with``.

    Args:
        port: Where to.
        delay_s: One way, also once each way before the first byte, as for a TCP handshake.
        loss: Part of the packets that come one round trip later, as after a fast retransmission.
        seed: Of what is lost.
        host: The address to listen at.
    """

    def __init__(
        self, port: int, delay_s: float = 0.0, loss: float = 0.0, seed: int = 0, host: str = "127.0.0.1"
    ) -> None:
        self._to_port, self._delay_s, self._loss, self._host = port, delay_s, loss, host
        self._random = random.Random(seed)
        self._loop = asyncio.new_event_loop()
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.connections = 0
        self.lost = 0
        """Chunks that came late because a packet of them was lost."""
        self.is_silent = False
        """Nothing passes; connections stay open, and new ones are accepted."""

    @property
    def url(self) -> str:
        return f"[{self._host}]:{self.port}" if ":" in self._host else f"{self._host}:{self.port}"

    def __enter__(self) -> Proxy:
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(self._listen(0), self._loop).result()
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(self, *_: object) -> None:
        self._call(self._close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _listen(self, port: int) -> asyncio.Server:
        return await asyncio.start_server(self._connected, self._host, port)

    def _call(self, function: Callable[[], None]) -> None:
        done = threading.Event()
        self._loop.call_soon_threadsafe(lambda: (function(), done.set()))
        done.wait()

    def _close(self) -> None:
        self._server.close()
        self._abort()
        for task in self._tasks:
            task.cancel()

    def _abort(self) -> None:
        for writer in self._writers:
            writer.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
            )
            writer.transport.abort()
        self._writers.clear()

    def reset(self) -> None:
        """Break all connections (RST)."""
        self._call(self._abort)

    def refuse(self) -> None:
        """Break all connections, and take no new ones."""
        self._call(lambda: (self._server.close(), self._abort()))

    def accept(self) -> None:
        """Take connections again, at the same port."""
        self.is_silent = False
        if not self._server.is_serving():
            listening = self._listen(self.port)
            self._server = asyncio.run_coroutine_threadsafe(listening, self._loop).result()

    def half_close(self) -> None:
        """Send an end to both sides of every connection and pass on nothing more, but keep them open."""
        self.is_silent = True
        self._call(lambda: [writer.write_eof() for writer in self._writers])

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._tasks.add(asyncio.current_task())
        self._writers.add(writer)
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self._to_port)
        except OSError:
            writer.transport.abort()
            return
        self._writers.add(back)
        with suppress(asyncio.CancelledError):
            await asyncio.gather(self._pass_on(reader, back), self._pass_on(there, writer))

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Read and write side by side, so that a delay does not become a limit of the rate."""
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def write() -> None:
            while True:
                due_s, data = await queue.get()
                await asyncio.sleep(due_s - self._loop.time())
                if self.is_silent:
                    continue
                if not data:
                    writer.close()
                    return
                writer.write(data)
                await writer.drain()

        writing = asyncio.ensure_future(write())
        self._tasks.add(writing)
        due_s = self._loop.time() + 2 * self._delay_s
        try:
            while True:
                data = await reader.read(CHUNK_BYTES)
                late_s = 0.0
                if self._loss and self._random.random() > (1 - self._loss) ** math.ceil(
                    len(data) / PACKET_BYTES
                ):
                    self.lost += 1
                    late_s = 2 * self._delay_s
                due_s = max(due_s, self._loop.time() + self._delay_s + late_s)
                queue.put_nowait((due_s, data))
                if not data:
                    await writing
                    return
        except OSError:
            writer.transport.abort()
        finally:
            self._writers.discard(writer)
