"""Servers that fall silent, slow down, break or run out of something: a whole run or one clear line."""

from __future__ import annotations

import queue
import sys
import threading
import time

import grpc
import numpy as np
import pytest
from client_fakes import FakeCuda, FakeTriton
from delay_proxy import Proxy

from mst_gan_client.errors import ServerError, UpscaleError
from mst_gan_client.serving import connection, pace
from mst_gan_client.serving import server as server_module
from mst_gan_client.serving.pace import Pace
from mst_gan_client.serving.server import Server
from mst_gan_client.serving.session import Session
from mst_gan_client.serving.transports.cuda import MODULE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

COUNT = 80
DEAD_STUB = (
    grpc.StatusCode.INTERNAL,
    "in ensemble 'mst_gan', Failed to process the request(s) for model 'generator_0_0', "
    "message: Stub process 'generator_0_0' is not healthy.",
)
QUEUE_FULL = (grpc.StatusCode.UNAVAILABLE, "in ensemble 'mst_gan', Exceeds maximum queue size")
BUSY = {
    "queue": QUEUE_FULL,
    "queue timeout": (grpc.StatusCode.UNAVAILABLE, "Request timeout expired"),
    "exhausted": (grpc.StatusCode.RESOURCE_EXHAUSTED, "concurrent requests"),
    "deadline": (grpc.StatusCode.DEADLINE_EXCEEDED, "stream timeout"),
    "proxy": (grpc.StatusCode.UNAVAILABLE, "Received http2 header with status: 429"),
}
OUT_OF_MEMORY = {
    "onnx": "onnx runtime error 6: Failed to allocate memory for requested buffer of size 117964800",
    "cuda": "CUDA error: out of memory",
    "shm": "Failed to increase the shared memory pool size for key 'mst_gan_1_1': No space left on device",
}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Seconds instead of minutes."""
    monkeypatch.setattr(pace, "SILENT_FLOOR_S", 1.0)
    monkeypatch.setattr(pace, "FIRST_SILENT_FLOOR_S", 2.0)
    monkeypatch.setattr(pace, "FIRST_LATE_FLOOR_S", 0.5)
    monkeypatch.setattr(connection, "LONGEST_BUSY_PAUSE_S", 0.1)
    monkeypatch.setattr(server_module, "ASK_TIMEOUT_S", 2.0)
    monkeypatch.setattr(server_module, "PROBE_AGAIN_TIMEOUT_S", 2.0)


@pytest.fixture
def open_session():
    opened = []

    def open_(*urls, **options):
        servers = [Server(url, "mst_gan") for url in urls]
        session = Session(servers, **options)
        opened.extend((session, *servers))
        return session

    yield open_
    for one in opened:
        one.close()


def lr_windows(count=COUNT):
    for t in range(count):
        yield np.full((3, 16, 16, 3), t % 256, np.uint8)


def values(answers):
    return [int(hr[0, 0, 0]) for hr in answers]


IN_ORDER = list(range(COUNT))


@pytest.fixture
def gate():
    """Opens at the end, so that no server waits for ever."""
    event = threading.Event()
    yield event
    event.set()


def test_windows_of_a_silent_server_go_to_another(open_session, gate):
    """It answers questions about its health all the while."""
    with (
        FakeTriton() as one,
        FakeTriton(before_answer=lambda count: count > 5 and gate.wait(60)) as silent,
    ):
        session = open_session(one.url, silent.url)
        assert values(session.hr_frames(lr_windows())) == IN_ORDER
        assert session.hedged > 0
        assert silent.requests <= 2 * silent_share(session, 1)
        gate.set()


def silent_share(session, index):
    return session._connections[index].capacity


def test_a_server_that_is_silent_from_the_start_costs_one_frame_no_minutes(open_session, gate):
    with FakeTriton() as one, FakeTriton(before_answer=lambda _: gate.wait(60)) as silent:
        session = open_session(one.url, silent.url)
        for count in (1, 3, COUNT):
            assert values(session.hr_frames(lr_windows(count))) == IN_ORDER[:count]
        gate.set()


def test_a_silent_server_alone_ends_the_run_in_one_line(open_session, gate):
    with FakeTriton(before_answer=lambda count: count > 20 and gate.wait(60)) as silent:
        session = open_session(silent.url, patience_s=1.0)
        silent.failure = lambda count: QUEUE_FULL if count == 0 and silent.requests > 20 else None
        with pytest.raises(ServerError, match=r"lost 127.0.0.1:\d+ and found no server for \d+ s: .*\["):
            values(session.hr_frames(lr_windows()))
        gate.set()


def test_a_round_that_begins_with_no_server_is_given_up_in_time_too(open_session):
    """As the second clip of many, when the first has lost the last server."""
    with FakeTriton() as triton:
        session = open_session(triton.url, patience_s=0.5)
        triton.stop()
        for _ in range(2):
            with pytest.raises(ServerError, match="found no server"):
                values(session.hr_frames(lr_windows()))
        triton.start()
        session._patience_s = 60
        assert values(session.hr_frames(lr_windows())) == IN_ORDER


def test_a_server_that_pauses_goes_on_and_its_late_answers_count(open_session):
    """As one whose machine was suspended; nothing is twice in the output."""
    with FakeTriton(before_answer=lambda count: count == 30 and time.sleep(3)) as triton:
        triton.before_answer = pause_all(triton, at=30, for_s=3.0)
        session = open_session(triton.url)
        assert values(session.hr_frames(lr_windows())) == IN_ORDER


def pause_all(triton, at, for_s):
    going_on = threading.Event()
    going_on.set()

    def before(count):
        if count == at:
            going_on.clear()
            threading.Timer(for_s, going_on.set).start()
        going_on.wait(60)

    return before


def test_late_answers_are_dropped(open_session):
    """A slow server's windows are taken over; its own answers to them come later and change nothing."""
    with (
        FakeTriton(before_answer=lambda _: time.sleep(0.005)) as fast,
        FakeTriton(before_answer=lambda _: time.sleep(1.0)) as slow,
    ):
        session = open_session(fast.url, slow.url)
        assert values(session.hr_frames(lr_windows())) == IN_ORDER
        assert session.hedged > 0 and session.resent == 0
        time.sleep(1.2)  # until the slow one has answered
        assert values(session.hr_frames(lr_windows(20))) == IN_ORDER[:20]


def test_a_server_that_becomes_ten_times_slower_is_waited_for(open_session):
    slowness = [0.02]
    with FakeTriton(before_answer=lambda _: time.sleep(slowness[0])) as triton:
        session = open_session(triton.url)

        def windows():
            for t, window in enumerate(lr_windows(48)):
                if t == 24:
                    slowness[0] = 0.2
                yield window

        assert values(session.hr_frames(windows())) == IN_ORDER[:48]
        assert session.resent == 0


@pytest.mark.parametrize("trouble", ["silence", "half_close", "reset", "refuse"])
@pytest.mark.parametrize("others", [0, 1])
def test_a_connection_that_breaks(open_session, trouble, others):
    """Of the only server it comes back, else the other one does the rest."""
    with FakeTriton() as triton, FakeTriton() as other, Proxy(triton.port) as proxy:

        def windows():
            for t, window in enumerate(lr_windows()):
                if t == 40:
                    if trouble == "silence":
                        proxy.is_silent = True
                    else:
                        getattr(proxy, trouble)()
                    if not others and trouble != "reset":
                        threading.Timer(3.0, proxy.accept).start()
                yield window

        session = open_session(proxy.url, *[other.url] * others, patience_s=30.0)
        assert values(session.hr_frames(windows())) == IN_ORDER


def test_a_connection_that_stays_silent_ends_the_run_in_one_line(open_session):
    with FakeTriton() as triton, Proxy(triton.port) as proxy:
        session = open_session(proxy.url, patience_s=1.0)
        proxy.is_silent = True
        with pytest.raises(ServerError, match=r"lost 127.0.0.1:\d+ and found no server for \d+ s"):
            values(session.hr_frames(lr_windows()))


def test_a_dead_stub_is_lost_however_healthy_the_server_says_it_is(open_session):
    with FakeTriton() as triton:
        session = open_session(triton.url, patience_s=1.0)
        triton.failure = lambda count: DEAD_STUB if count == 0 or count > 20 else None
        with pytest.raises(ServerError, match="Stub process 'generator_0_0' is not healthy"):
            values(session.hr_frames(lr_windows()))


def test_the_windows_of_a_dead_stub_go_to_another_server(open_session, caplog):
    with FakeTriton() as one, FakeTriton() as two:
        session = open_session(one.url, two.url)
        two.failure = lambda count: DEAD_STUB if count == 0 or count > 5 else None
        assert values(session.hr_frames(lr_windows())) == IN_ORDER
        assert f"lost {two.url} (" in caplog.text and "is back" not in caplog.text


@pytest.mark.parametrize("kind", BUSY)
def test_back_pressure_is_no_death(open_session, caplog, kind):
    """A server that takes 3 at once, less than its config says; then one that refuses thirty in a row."""
    caplog.set_level("INFO")
    with FakeTriton(before_answer=lambda _: time.sleep(0.01)) as triton:
        session = open_session(triton.url)
        triton.failure = lambda count: BUSY[kind] if triton.under_way > 3 else None
        assert values(session.hr_frames(lr_windows())) == IN_ORDER
        assert triton.requests > COUNT
        triton.failure = lambda count: BUSY[kind] if count < refused_until else None
        refused_until = triton.requests + 30
        assert values(session.hr_frames(lr_windows(2))) == IN_ORDER[:2]
        assert session.resent == 0
    assert "lost" not in caplog.text and "is back" not in caplog.text
    assert f"{triton.url} is busy" in caplog.text


def test_a_busy_server_gets_as_many_at_once_as_it_takes(open_session):
    """Not one at a time for ever, and not all again after every answer."""
    with FakeTriton(before_answer=lambda _: time.sleep(0.01)) as triton:
        session = open_session(triton.url)
        triton.failure = lambda count: QUEUE_FULL if triton.under_way > 8 else None
        assert values(session.hr_frames(lr_windows(240))) == [t % 256 for t in range(240)]
        assert triton.most_under_way > 4
        refused = triton.requests - 240
        assert refused < 120


def test_a_server_that_stays_busy_is_given_up_with_its_reason(open_session):
    with FakeTriton() as triton:
        session = open_session(triton.url, stall_s=1.5)
        triton.failure = lambda count: QUEUE_FULL
        with pytest.raises(ServerError, match=r"gave no answer for \d s: .*Exceeds maximum queue size"):
            values(session.hr_frames(lr_windows()))


def test_a_message_over_a_limit_is_no_back_pressure(open_session):
    with FakeTriton() as triton:
        session = open_session(triton.url)
        triton.failure = lambda count: (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "Received message larger than max (8294400 vs. 4194304)",
        )
        with pytest.raises(UpscaleError, match="refused frame 1 of this run: Received message larger"):
            values(session.hr_frames(lr_windows(1)))


@pytest.mark.parametrize("text", OUT_OF_MEMORY.values(), ids=OUT_OF_MEMORY)
def test_a_server_short_of_memory_gets_less_at_once(open_session, text):
    with FakeTriton(before_answer=lambda _: time.sleep(0.01)) as triton:
        session = open_session(triton.url)
        error = (grpc.StatusCode.INTERNAL, text)
        triton.failure = lambda count: error if triton.under_way > 3 else None
        assert values(session.hr_frames(lr_windows())) == IN_ORDER
        triton.failure = lambda count: error
        with pytest.raises(UpscaleError, match="refused frame 1 of this run: "):
            values(session.hr_frames(lr_windows(1)))


@pytest.mark.parametrize("error", [KeyError("outputs"), MemoryError(), AttributeError("shape"), OSError(5)])
def test_whatever_a_callback_raises_is_the_error_of_its_window(open_session, monkeypatch, error):
    """It stalled for a quarter of an hour."""
    with FakeTriton() as triton:
        session = open_session(triton.url)

        def fail(*_):
            raise error

        monkeypatch.setattr(Server, "_hr_from_result", fail)
        with pytest.raises(UpscaleError, match=f"refused frame 1 of this run: {type(error).__name__}"):
            values(session.hr_frames(lr_windows(1)))


def test_whatever_sending_raises_is_the_error_of_its_window(open_session, monkeypatch):
    with FakeTriton() as triton:
        session = open_session(triton.url)

        def fail(*_, **__):
            raise ValueError("Message exceeds maximum size")

        monkeypatch.setattr(server_module.InferenceServerClient, "async_infer", fail)
        with pytest.raises(UpscaleError, match="refused frame 1 of this run: ValueError: Message exceeds"):
            values(session.hr_frames(lr_windows(1)))


@pytest.fixture
def cuda(monkeypatch):
    module = FakeCuda()
    monkeypatch.setitem(sys.modules, MODULE, module)
    return module


def test_shared_memory_is_not_used_again_before_its_answer_has_come(open_session, cuda, gate):
    """A server that was overtaken may still write there: the pixels of another window, if it were used."""
    with (
        FakeTriton(cuda=cuda, before_answer=lambda _: time.sleep(0.002)) as fast,
        FakeTriton(cuda=cuda, before_answer=lambda count: count > 3 and gate.wait(60)) as silent,
    ):
        session = open_session(fast.url, silent.url)
        session.share_memory((3, 16, 16, 3), "cuda")
        ring = session._connections[1].server._ring
        assert values(session.hr_frames(lr_windows())) == IN_ORDER
        held = ring._slots - len(ring._free)
        assert held == silent.under_way > 0
        threading.Timer(0.5, gate.set).start()
        assert values(session.hr_frames(lr_windows())) == IN_ORDER
        while silent.under_way:
            time.sleep(0.01)


def test_shared_memory_of_a_lost_connection_is_not_used_again(cuda):
    """The server may be well, and still at work on it."""
    with FakeTriton(cuda=cuda) as triton:
        server = Server(triton.url, "mst_gan")
        server.share_memory((3, 16, 16, 3), "cuda")
        free = len(server._ring._free)
        errors, answers = [], queue.SimpleQueue()
        for error in (QUEUE_FULL, (grpc.StatusCode.UNAVAILABLE, "Socket closed")):
            triton.failure = lambda count, error=error: error
            server.ask(np.zeros((3, 16, 16, 3), np.uint8), lambda *answer: answers.put(answer))
            errors.append(answers.get(timeout=60)[1].message())
        assert errors == [QUEUE_FULL[1], "Socket closed"]
        assert len(server._ring._free) == free - 1
        server.close()


def test_more_windows_than_shared_memory_go_through_grpc(cuda):
    with FakeTriton(cuda=cuda) as triton:
        server = Server(triton.url, "mst_gan")
        server.share_memory((3, 16, 16, 3), "cuda")
        slots = list(server._ring._free)
        server._ring._free.clear()
        answers = queue.SimpleQueue()
        server.ask(np.full((3, 16, 16, 3), 7, np.uint8), lambda *answer: answers.put(answer))
        assert answers.get(timeout=60)[0][0, 0, 0] == 7
        assert triton.cuda_requests == 0
        server._ring._free.extend(slots)
        server.close()


def test_how_long_a_server_may_be_silent(monkeypatch):
    monkeypatch.undo()
    learned = Pace(pixels=100, took_s=0.1)
    assert learned.silence_s(100) == 60  # a guess
    assert learned.silence_s(100_000) == 900  # of 100 s, sixteen times that would be more
    for _ in range(50):
        learned.learn(1000, 3.0)
    assert learned.usual_s(1000) == pytest.approx(3.0, rel=0.01)
    assert learned.silence_s(1000) == pytest.approx(24, rel=0.01)
    assert learned.silence_s(2000) == pytest.approx(96, rel=0.01)  # another size: a guess again
    learned.was_silent()
    assert learned.silence_s(1000) == pytest.approx(48, rel=0.01)
    learned.learn(1000, 3.0)
    assert learned.silence_s(1000) == pytest.approx(24, rel=0.01)
    for _ in range(100):
        learned.learn(1000, 0.001)
    assert learned.silence_s(1000) == 10


def test_a_server_that_slows_down_is_not_called_silent():
    """Ten times slower, step by step, as its queue fills: the limit grows before it is reached."""
    learned = Pace(pixels=100, took_s=1.0)
    for _ in range(20):
        learned.learn(100, 10.0)
    for took_s in range(10, 101, 6):
        assert learned.silence_s(100) > took_s
        learned.learn(100, float(took_s))
