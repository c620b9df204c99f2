"""The client of every served rung: so many requests in flight, frames in shared memory, answers kept."""

from __future__ import annotations

import os
import queue
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from tritonclient.grpc import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException, shared_memory

from perf.clip import Frames
from perf.errors import PerfError
from perf.ladder.pace import enough

ANSWER_TIMEOUT_S = 300  # of one request; the slowest rung takes seconds on a slow processor
RELEASE_TIMEOUT_S = 10


@dataclass(frozen=True)
class Tensors:
    """The ensemble's input and output."""

    model: str
    input_name: str
    output_name: str
    scale: int


@dataclass(frozen=True)
class Load:
    """What came back."""

    done_s: list[float]
    """When each answer came, on the monotonic clock."""
    answers: Frames
    """Of the first pass over the clip, in its order."""


class Slots:
    """Shared memory for requests in flight: a window and its answer in each slot."""

    def __init__(
        self, client: InferenceServerClient, count: int, window: tuple[int, ...], answer: tuple[int, ...]
    ) -> None:
        """Have the server see it; shapes are of uint8 arrays."""
        self.client, self.window, self.answer = client, window, answer
        self.window_bytes, self.answer_bytes = int(np.prod(window)), int(np.prod(answer))
        self.stride = self.window_bytes + self.answer_bytes
        self.name = f"ladder_{os.getpid()}"
        self.memory = shared_memory.create_shared_memory_region(
            self.name, f"/{self.name}", count * self.stride
        )
        try:
            client.register_system_shared_memory(self.name, f"/{self.name}", count * self.stride)
        except BaseException:
            shared_memory.destroy_shared_memory_region(self.memory)
            raise

    def put(self, slot: int, window: Frames) -> None:
        """Copy a window in."""
        shared_memory.set_shared_memory_region(self.memory, [window], slot * self.stride)

    def take(self, slot: int) -> Frames:
        """Copy an answer out."""
        offset = slot * self.stride + self.window_bytes
        view = shared_memory.get_contents_as_numpy(self.memory, np.uint8, self.answer, offset)
        return np.array(view, dtype=np.uint8)

    def request(self, slot: int, tensors: Tensors) -> dict[str, Any]:
        """Arguments of a request that reads and writes this slot."""
        lr = InferInput(tensors.input_name, [1, *self.window], "UINT8")
        lr.set_shared_memory(self.name, self.window_bytes, slot * self.stride)
        hr = InferRequestedOutput(tensors.output_name)
        hr.set_shared_memory(self.name, self.answer_bytes, slot * self.stride + self.window_bytes)
        return {"model_name": tensors.model, "inputs": [lr], "outputs": [hr]}

    def close(self) -> None:
        """Let go of it, whether the server still answers or not."""
        try:
            self._unregister()
        finally:
            shared_memory.destroy_shared_memory_region(self.memory)

    def _unregister(self) -> None:
        # An answer is sent a moment before the server lets go of its memory.
        deadline_s = time.monotonic() + RELEASE_TIMEOUT_S
        while True:
            try:
                return self.client.unregister_system_shared_memory(self.name)
            except InferenceServerException:
                if time.monotonic() > deadline_s:
                    raise
                time.sleep(0.05)


@contextmanager
def slots(
    client: InferenceServerClient, count: int, window: tuple[int, ...], answer: tuple[int, ...]
) -> Iterator[Slots]:
    """Slots that are gone afterwards."""
    opened = Slots(client, count, window, answer)
    try:
        yield opened
    finally:
        opened.close()


def run_load(grpc_url: str, tensors: Tensors, windows: Frames, in_flight: int, least_s: float) -> Load:
    """Send the windows in turn, again and again, with so many in flight.

    Args:
        grpc_url: ``host:port``.
        tensors: What to ask for.
        windows: (T, window, H, W, 3) uint8.
        in_flight: Requests kept at the server.
        least_s: Seconds to go on for; the whole clip passes in the steady state in any case.

    Raises:
        PerfError: The server refuses a request or does not answer it.
    """
    height, width = windows.shape[2:4]
    answer = (height * tensors.scale, width * tensors.scale, 3)
    done_s: list[float] = []
    answers: dict[int, Frames] = {}
    arrived: queue.SimpleQueue[tuple[int, int, float, Exception | None]] = queue.SimpleQueue()

    def came(index: int, slot: int, result: object, error: Exception | None) -> None:
        arrived.put((index, slot, time.monotonic(), error))

    try:
        with (
            InferenceServerClient(grpc_url) as client,
            slots(client, in_flight, windows.shape[1:], answer) as memory,
        ):

            def send(index: int, slot: int) -> None:
                memory.put(slot, windows[index % len(windows)])
                client.async_infer(callback=partial(came, index, slot), **memory.request(slot, tensors))

            started_s = time.monotonic()
            for slot in range(in_flight):
                send(slot, slot)
            sent = in_flight
            while len(done_s) < sent:
                index, slot, now_s, error = arrived.get(timeout=ANSWER_TIMEOUT_S)
                if error:
                    raise error
                done_s.append(now_s)
                if index < len(windows):
                    answers[index] = memory.take(slot)
                if not enough(len(done_s), now_s - started_s, in_flight, len(windows), least_s):
                    send(sent, slot)
                    sent += 1
    except InferenceServerException as err:
        raise PerfError(f"the server refused a request: {err.message()}") from err
    except queue.Empty as err:
        raise PerfError(f"the server did not answer within {ANSWER_TIMEOUT_S} s") from err
    return Load(sorted(done_s), np.stack([answers[index] for index in range(len(windows))]))
