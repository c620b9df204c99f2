"""Memory that this process and a Triton server on the same machine both see."""

from __future__ import annotations

import math
import mmap
import os
import secrets
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from tritonclient.grpc import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException

from ...frames.windows import Image

SHARED_FOLDER = Path("/dev/shm")  # where POSIX shared memory lives on Linux
NAME_PREFIX = "vsr-upscale"  # a dash and the owner's process id follow
ALIGNMENT_BYTES = 4096
LEFTOVER_AGE_S = 60.0
TELL_TIMEOUT_S = 10.0  # for the server's notes about memory: cheap, but a loaded machine takes its time


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
        self._client, self._slots = client, slots
        self._lr_bytes, self._hr_bytes = math.prod(lr_shape), math.prod(hr_shape)
        self._free = deque(range(slots))
        self._name = f"{NAME_PREFIX}-{os.getpid()}-{secrets.token_hex(4)}"
        self._open()

    def put(self, lr_window: Image) -> int:
        """Copy a window into a free slot, and return the slot."""
        slot = self._free.popleft()
        try:
            self._write(slot, lr_window)
        except InferenceServerException:
            self.free(slot)
            raise
        return slot

    def free(self, slot: int) -> None:
        """Let the slot be used again."""
        self._free.append(slot)

    @abstractmethod
    def _open(self) -> None:
        """Make the memory, and have the server open it."""

    @abstractmethod
    def _write(self, slot: int, lr_window: Image) -> None: ...

    @abstractmethod
    def attach(self, slot: int, lr_input: InferInput, hr_output: InferRequestedOutput) -> None:
        """Let a request use a slot."""

    @abstractmethod
    def take(self, slot: int) -> Image:
        """Copy the answer out of a slot."""

    @abstractmethod
    def close(self) -> None:
        """Have the server let go of it, then let go of it here."""


class SystemRing(Ring):
    """A ring in POSIX shared memory.

    The memory loses its name as soon as the server has it open, so it vanishes with the two
    processes, however they end. Only a server's note of a killed client's ring outlives it, and the
    name of one that was killed before the server had it open, until the next client comes by.

    Raises:
        OSError: There is no such memory here, or not enough.
        InferenceServerException: The server cannot see it, or will not.
    """

    def _open(self) -> None:
        self._stride = -(-(self._lr_bytes + self._hr_bytes) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        size = self._slots * self._stride
        remove_leftovers()
        path = SHARED_FOLDER / self._name
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, size)  # or a write would find the memory full
            self._memory = mmap.mmap(descriptor, size)
            self._forget_the_dead()
            self._client.register_system_shared_memory(self._name, f"/{self._name}", size)
        finally:
            os.close(descriptor)
            path.unlink()

    def _write(self, slot: int, lr_window: Image) -> None:
        self._view(slot * self._stride, self.lr_shape)[...] = lr_window

    def attach(self, slot: int, lr_input: InferInput, hr_output: InferRequestedOutput) -> None:
        """Let a request use a slot."""
        lr_input.set_shared_memory(self._name, self._lr_bytes, slot * self._stride)
        hr_output.set_shared_memory(self._name, self._hr_bytes, slot * self._stride + self._lr_bytes)

    def take(self, slot: int) -> Image:
        """Copy the answer out of a slot."""
        return self._view(slot * self._stride + self._lr_bytes, self.hr_shape).copy()

    def _view(self, offset: int, shape: tuple[int, ...]) -> Image:
        return np.ndarray(shape, np.uint8, self._memory, offset)

    def close(self) -> None:
        """Have the server let go of it; our side ends with this object."""
        with suppress(InferenceServerException):  # a server that is gone has let go
            self._client.unregister_system_shared_memory(self._name, client_timeout=TELL_TIMEOUT_S)
            self._forget_the_dead()

    def _forget_the_dead(self) -> None:
        forget_the_dead(
            self._client.get_system_shared_memory_status, self._client.unregister_system_shared_memory
        )


def forget_the_dead(status: Callable[..., Any], unregister: Callable[..., None]) -> None:
    """Have a server on this machine let go of rings whose clients were killed.

    It refuses while it still answers what they had asked. So a client tries as it comes and as it goes.
    """
    for name in status(client_timeout=TELL_TIMEOUT_S).regions:
        if _is_dead(name):
            with suppress(InferenceServerException):
                unregister(name, client_timeout=TELL_TIMEOUT_S)


def remove_leftovers() -> None:
    """Free the memory of clients that were killed while they set up their ring."""
    for path in SHARED_FOLDER.glob(f"{NAME_PREFIX}-*"):
        # Processes of another container have no entry in our /proc; theirs lose their name in a moment.
        with suppress(OSError):
            if _is_dead(path.name) and time.time() - path.stat().st_mtime > LEFTOVER_AGE_S:
                path.unlink()


def _is_dead(name: str) -> bool:
    prefix, _, process = name.rpartition("-")[0].rpartition("-")
    return prefix == NAME_PREFIX and process.isdecimal() and not Path("/proc", process).exists()
