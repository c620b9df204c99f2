"""Queues of the embedded server: live requests overtake others, and what waits too long is refused."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import tritonclient.grpc as grpcclient
from tritonclient.utils import InferenceServerException

from deploy.embedded.server import TritonServer
from export import spec
from mst_gan_client.serving.faults import Fault, fault_of
from mst_gan_client.serving.trail import PRIORITIES

pytestmark = [pytest.mark.server, pytest.mark.timeout(180)]

MANY, FEW = 48, 4
OVERTAKEN = 16  # more than two instances with a batch of 4 each can mix up, in two stages
ATTEMPTS = 10  # the queue may be empty when the live requests come: on a machine that stood still meanwhile
PATIENCE_S = 30


@pytest.fixture(scope="module")
def client(toy_server: TritonServer) -> Iterator[grpcclient.InferenceServerClient]:
    with grpcclient.InferenceServerClient(toy_server.grpc_url) as client:
        yield client


class Sent:
    """Requests under way, and their answers in the order in which they come."""

    def __init__(self, client: grpcclient.InferenceServerClient) -> None:
        self._client = client
        self._news = threading.Condition()
        self.answers: list[tuple[str, InferenceServerException | None]] = []

    def send(self, name: str, count: int, side: int = 64, **options: int) -> None:
        window = np.zeros(spec.LR_WINDOW.shape(1, (side, side)), np.uint8)
        lr_window = grpcclient.InferInput(spec.LR_WINDOW.name, window.shape, spec.LR_WINDOW.dtype)
        lr_window.set_data_from_numpy(window)

        def note(result: object, error: InferenceServerException | None) -> None:
            with self._news:
                self.answers.append((name, error))
                self._news.notify()

        for _ in range(count):
            self._client.async_infer(spec.ENSEMBLE.name, [lr_window], note, **options)

    def wait(self, count: int) -> None:
        with self._news:
            assert self._news.wait_for(lambda: len(self.answers) >= count, PATIENCE_S), "requests hang"


def overtakes(client: grpcclient.InferenceServerClient, priority: str) -> bool:
    """Whether requests of this priority overtake many of ``batch`` that were sent before them."""
    sent = Sent(client)
    sent.send("batch", MANY, priority=PRIORITIES["batch"])
    sent.wait(1)  # the queue of the generator is full now
    sent.send("other", FEW, priority=PRIORITIES[priority])
    sent.wait(MANY + FEW)
    assert not any(error for _, error in sent.answers)
    names = [name for name, _ in sent.answers]
    last = len(names) - 1 - names[::-1].index("other")
    return len(names) - 1 - last >= OVERTAKEN


def test_live_overtakes_batch(client: grpcclient.InferenceServerClient) -> None:
    assert any(overtakes(client, "live") for _ in range(ATTEMPTS))
    assert not all(overtakes(client, "batch") for _ in range(3))


def test_a_request_that_waits_too_long_is_refused_as_busy(client: grpcclient.InferenceServerClient) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        sent = Sent(client)
        sent.send("batch", MANY, priority=PRIORITIES["batch"])
        sent.wait(1)
        sent.send("hurried", FEW, priority=PRIORITIES["batch"], timeout=1000)  # microseconds
        sent.wait(MANY + FEW)
        refused = [error for name, error in sent.answers if name == "hurried" and error]
        assert not any(error for name, error in sent.answers if name == "batch")
        if refused:
            break
        assert time.monotonic() < deadline
    assert {fault_of(error) for error in refused} == {Fault.BUSY}, refused
