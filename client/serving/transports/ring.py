"""Memory that this process and a Triton server both see: one slot for each request in flight."""

from __future__ import annotations

import math
import os
import secrets
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any

from tritonclient.grpc import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException

from ...frames.windows import Image

NAME_PREFIX = "vsr-upscale"  # the owner's pid namespace and process id follow, then a random token
TELL_TIMEOUT_S = 10.0  # for the server's notes about memory: cheap, but a loaded machine takes its time
RELEASE_TIMEOUT_S = 30.0  # for requests that were given up to end
RETRY_PAUSE_S = 0.05
IN_USE = "in use"  # part of Triton's refusal to unregister a region that a request still uses


_kept: list[Ring] = []
"""Closed rings that a server may still have open. They stay, for it may still write into their memory."""


def kept_rings(client: InferenceServerClient) -> list[Ring]:
    """Closed rings that the server of this client has not let go of."""
    return [ring for ring in _kept if ring.client is client]


class Ring(ABC):
    """One slot for each request in flight: a window in, an hr frame out.

    Args:
        client: Connected to the server.
        slots: Requests in flight.
        lr_shape: Shape of every window, (T, H, W, 3).
        hr_shape: Shape of every answer.
    """

    def __init__(
        self,
        client: InferenceServerClient,
        slots: int,
        lr_shape: tuple[int, ...],
        hr_shape: tuple[int, ...],
    ) -> None:
        self.lr_shape, self.hr_shape = lr_shape, hr_shape
        self.client, self._slots = client, slots
        self._lr_bytes, self._hr_bytes = math.prod(lr_shape), math.prod(hr_shape)
        self._free = deque(range(slots))
        self._retired = 0
        self._slot_freed = threading.Condition()
        self._registered: list[str] = []
        self._is_closed = False
        self._name = f"{NAME_PREFIX}-{pid_namespace()}-{os.getpid()}-{secrets.token_hex(4)}"
        try:
            self._open()
        except BaseException:
            self.close(timeout_s=0)
            raise

    @property
    def size_bytes(self) -> int:
        """Size of the memory."""
        return self._slots * (self._lr_bytes + self._hr_bytes)

    def put(self, lr_window: Image) -> int:
        """Copy a window into a free slot, and return the slot.

        Raises:
            IndexError: None is free.
        """
        slot = self._free.popleft()
        try:
            self._write(slot, lr_window)
        except InferenceServerException:
            self.free(slot)
            raise
        return slot

    def free(self, slot: int) -> None:
        """Let the slot be used again; the last one to come back after the end frees the memory."""
        with self._slot_freed:
            self._free.append(slot)
            self._slot_freed.notify_all()
        self._destroy_if_unused()

    def retire(self, slot: int) -> None:
        """Give a slot back without letting it be used again: the server may still write into it."""
        with self._slot_freed:
            self._retired += 1
            self._slot_freed.notify_all()
        self._destroy_if_unused()

    @property
    def _is_unused(self) -> bool:
        return len(self._free) + self._retired == self._slots

    def close(self, timeout_s: float = RELEASE_TIMEOUT_S) -> bool:
        """Wait for requests under way, have the server let go of the memory, then free it.

        Memory that the server has not let go of stays: it may still write into it. Call again later.

        Args:
            timeout_s: How long to wait; with 0, each region is tried once.

        Returns:
            Whether the server refused, because it still uses some of the memory.
        """
        deadline_s = time.monotonic() + timeout_s
        with self._slot_freed:
            self._is_closed = True
            self._slot_freed.wait_for(lambda: self._is_unused, timeout_s)
        if self not in _kept:
            _kept.append(self)
        refused = list(self._registered)
        try:
            while refused := [name for name in refused if self._is_refused(name)]:
                if time.monotonic() >= deadline_s:
                    break
                time.sleep(RETRY_PAUSE_S)
            self._release_others()
        except InferenceServerException:
            refused = []  # no answer; Triton closes its port before its last requests end
        self._destroy_if_unused()
        return bool(refused)

    def _is_refused(self, name: str) -> bool:
        """Unregister a region, and tell whether the server refuses it because it is in use.

        Raises:
            InferenceServerException: There was no answer.
        """
        try:
            self._unregister(name)
        except InferenceServerException as err:
            if IN_USE in err.message():
                return True
            raise
        self._registered.remove(name)
        return False

    def _release_others(self) -> None:
        """Have the server let go of rings of dead clients, and of this process's closed ones.

        It refuses while it still answers what they had asked. So this is tried with every ring that opens or
        closes.
        """
        for name in self._regions_of_server():
            closed = next((ring for ring in _kept if name in ring._registered), None)
            if closed or is_dead(name):
                with suppress(InferenceServerException):
                    self._unregister(name)
                    if closed:
                        closed._registered.remove(name)
                        closed._destroy_if_unused()

    def _destroy_if_unused(self) -> None:
        """Free the memory that the server has let go of, unless an answer in it waits to be read."""
        with self._slot_freed:
            if self._is_closed and self._is_unused:
                self._destroy()
                if not self._registered and self in _kept:
                    _kept.remove(self)

    @abstractmethod
    def _open(self) -> None:
        """Make the memory, and have the server open it; ``_registered`` gets every name before."""

    @abstractmethod
    def _write(self, slot: int, lr_window: Image) -> None: ...

    @abstractmethod
    def attach(self, slot: int, lr_input: InferInput, hr_output: InferRequestedOutput) -> None:
        """Let a request use a slot."""

    @abstractmethod
    def take(self, slot: int) -> Image:
        """Copy the answer out of a slot."""

    @abstractmethod
    def _unregister(self, name: str) -> None: ...

    @abstractmethod
    def _regions_of_server(self) -> Any:
        """Names of all regions of this kind that are registered."""

    @abstractmethod
    def _destroy(self) -> None:
        """Free all memory that is no longer registered."""


def pid_namespace() -> str:
    """What makes a process id unique: this start of this machine, and the pid namespace in it.

    Another container or another machine may have a process of the same number, or none. Where /proc does not
    tell, nobody's process can be found dead.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        return f"{boot[:8]}{os.stat('/proc/self/ns/pid').st_ino:x}"
    except OSError:
        return secrets.token_hex(8)


def is_dead(name: str) -> bool:
    """Whether memory of this name belonged to a client that is certainly dead."""
    prefix, _, rest = name.partition(f"{NAME_PREFIX}-{pid_namespace()}-")
    process = rest.partition("-")[0]
    if prefix or not process.isdecimal():
        return False
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        pass
    return False
