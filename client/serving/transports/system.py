"""A ring in POSIX shared memory, for a Triton server on the same machine."""

from __future__ import annotations

import mmap
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from tritonclient.grpc import InferInput, InferRequestedOutput

from ...frames.windows import Image
from .ring import NAME_PREFIX, TELL_TIMEOUT_S, Ring, is_dead

SHARED_FOLDER = Path("/dev/shm")  # where POSIX shared memory lives on Linux
ALIGNMENT_BYTES = 4096


class SystemRing(Ring):
    """A ring in POSIX shared memory.

    The memory loses its name as soon as the server has it open, so it vanishes with the two
    processes, however they end. Only a server's note of a killed client's ring outlives it, and the
    name of one that was killed before the server had it open, until the next client comes by.

    Raises:
        OSError: There is no such memory here, or not enough.
        InferenceServerException: The server cannot see it, or will not.
    """

    _memory: mmap.mmap | None = None

    def _open(self) -> None:
        self._stride = -(-(self._lr_bytes + self._hr_bytes) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        size = self._slots * self._stride
        remove_leftovers()
        path = SHARED_FOLDER / self._name
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, size)  # or a write would find the memory full
            self._memory = mmap.mmap(descriptor, size)
            self._release_others()
            self._registered.append(self._name)
            self.client.register_system_shared_memory(
                self._name, f"/{self._name}", size, client_timeout=TELL_TIMEOUT_S
            )
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

    def _unregister(self, name: str) -> None:
        self.client.unregister_system_shared_memory(name, client_timeout=TELL_TIMEOUT_S)

    def _regions_of_server(self) -> Any:
        return self.client.get_system_shared_memory_status(client_timeout=TELL_TIMEOUT_S).regions

    def _destroy(self) -> None:
        self._memory = None  # our side of it; the server has its own


def remove_leftovers() -> None:
    """Free the memory of clients that were killed while they set up their ring."""
    for path in SHARED_FOLDER.glob(f"{NAME_PREFIX}-*"):
        if is_dead(path.name):
            with suppress(OSError):  # another user's, or gone meanwhile
                path.unlink()
