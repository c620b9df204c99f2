"""A client that stands still, as when its machine is paused: its servers have not been silent meanwhile."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from client_fakes import LOSSLESS, FakeTriton, decoded, nearest, pictures, write_clip
from tritonclient.utils import InferenceServerException

from mst_gan_client.errors import ServerError
from mst_gan_client.serving import awake
from mst_gan_client.serving.awake import LONGEST_GAP_S, AwakeClock, answer_of
from mst_gan_client.serving.server import Server
from mst_gan_client.serving.session import Session

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

PAUSE_S = 1000.0


class Clock:
    """Goes on with time, and jumps when told to."""

    def __init__(self) -> None:
        self.jumped_s = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.jumped_s

    def jump(self) -> None:
        self.jumped_s += PAUSE_S


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(awake, "CLOCK", AwakeClock(clock))
    return clock


def test_the_clock_leaves_out_what_the_process_stood_still():
    shown_s = [100.0]
    clock = AwakeClock(lambda: shown_s[0])
    clock._tick = lambda: None  # read by this test alone
    read = [clock.now_s()]
    for step_s in (0.5, LONGEST_GAP_S, PAUSE_S, 0.25, 2 * LONGEST_GAP_S, 0.0):
        shown_s[0] += step_s
        read.append(clock.now_s())
    steps = [after - before for before, after in pairwise(read)]
    assert steps == [0.5, LONGEST_GAP_S, 0, 0.25, 0, 0]
    assert clock.stood_still_s() == PAUSE_S + 2 * LONGEST_GAP_S


def test_the_clock_is_read_although_nobody_asks():
    """Else an idle process, between two clips, would seem to have stood still."""
    read = threading.Semaphore(0)

    def monotonic():
        read.release()
        return 0.0

    clock = AwakeClock(monotonic)
    clock.now_s()
    assert all(read.acquire(timeout=60) for _ in range(3))


def lr_windows(count, at, do):
    for t in range(count):
        if t == at:
            do()
        yield np.full((3, 16, 16, 3), t, np.uint8)


def test_servers_are_not_lost_when_the_client_stood_still(clock, caplog):
    """Two servers owe answers while a thousand seconds pass in which nothing of the client ran."""
    gate = threading.Event()

    def stand_still():
        clock.jump()
        threading.Timer(0.5, gate.set).start()

    with (
        FakeTriton(before_answer=lambda count: count <= 4 or gate.wait(60)) as one,
        FakeTriton(before_answer=lambda count: count <= 4 or gate.wait(60)) as two,
    ):
        servers = [Server(triton.url, "mst_gan") for triton in (one, two)]
        session = Session(servers, patience_s=1.0)
        before = [connection.pace.silence_s(2304) for connection in session._connections]
        answers = session.hr_frames(lr_windows(60, 30, stand_still))
        assert [int(hr[0, 0, 0]) for hr in answers] == list(range(60))
        after = [connection.pace.silence_s(2304) for connection in session._connections]
        assert (session.resent, session.hedged) == (0, 0)
        assert max(after) <= max(before)  # nor are they taken for slow from now on
        for server in servers:
            server.close()
    assert "lost" not in caplog.text


def test_patience_does_not_end_while_the_client_stands_still(clock):
    """The only server goes away, the client's machine is paused, and then the server comes back."""
    with FakeTriton() as triton:
        server = Server(triton.url, "mst_gan")
        session = Session([server], patience_s=PAUSE_S / 10)

        def go_away():
            triton.stop()
            threading.Timer(1.0, clock.jump).start()
            threading.Timer(1.5, triton.start).start()

        answers = session.hr_frames(lr_windows(20, 10, go_away))
        assert [int(hr[0, 0, 0]) for hr in answers] == list(range(20))
        session.close()
        server.close()


def test_a_deadline_that_passed_while_the_client_stood_still_is_no_answer(clock):
    late = InferenceServerException("Deadline Exceeded", status="StatusCode.DEADLINE_EXCEEDED")
    asked = []

    def ask(stands_still):
        asked.append(stands_still)
        if len(asked) == 1:
            if stands_still:
                clock.jump()
            raise late
        return "answer"

    assert answer_of(lambda: ask(True)) == "answer"
    asked.clear()
    with pytest.raises(InferenceServerException, match="Deadline"):
        answer_of(lambda: ask(False))


# Seconds instead of minutes: the run may be silent for less than it is stopped.
CLIENT = """
import sys
from mst_gan_client.serving import pace
pace.SILENT_FLOOR_S = pace.FIRST_SILENT_FLOOR_S = 4.0
pace.SILENT_AFTER = pace.FIRST_SILENT_AFTER = 0
from mst_gan_client.upscale import main
sys.exit(main())
"""
STOPPED_S = 8.0


def test_a_client_that_is_stopped_and_continued_loses_no_server(tmp_path: Path):
    """SIGSTOP with requests at both servers, which answer only after it."""
    images = pictures(24, 16, 16)
    clip = write_clip(tmp_path / "in.mkv", images, codec="ffv1", pix_fmt="bgr0")
    out, gate = tmp_path / "out.mkv", threading.Event()
    with (
        FakeTriton(before_answer=lambda count: count <= 3 or gate.wait(60)) as one,
        FakeTriton(before_answer=lambda count: count <= 3 or gate.wait(60)) as two,
    ):
        urls = f"{one.url},{two.url}"
        command = [sys.executable, "-c", CLIENT, clip, out, "--url", urls, "--patience", "1", *LOSSLESS]
        with subprocess.Popen(
            [*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as client:
            try:
                while not (one.under_way and two.under_way):
                    assert client.poll() is None, client.stdout.read()
                    time.sleep(0.01)
                os.kill(client.pid, signal.SIGSTOP)
                time.sleep(STOPPED_S)
                os.kill(client.pid, signal.SIGCONT)
                threading.Timer(0.3, gate.set).start()
                said, _ = client.communicate(timeout=100)
            finally:
                client.kill()
                gate.set()
    assert client.returncode == 0, said
    assert "lost" not in said
    for expected, found in zip(images, decoded(out), strict=True):
        np.testing.assert_array_equal(found, nearest(np.stack([expected] * 3)[None])[0])


def test_a_server_that_is_silent_while_the_client_runs_is_still_lost(clock, monkeypatch):
    """The other half: standing still does not make a silent server look well for ever."""
    monkeypatch.setattr("mst_gan_client.serving.pace.FIRST_SILENT_FLOOR_S", 1.5)
    monkeypatch.setattr("mst_gan_client.serving.pace.SILENT_FLOOR_S", 1.5)
    gate = threading.Event()
    with FakeTriton(before_answer=lambda count: count > 3 and gate.wait(60)) as triton:
        server = Server(triton.url, "mst_gan")
        session = Session([server], patience_s=1.0)
        triton.refusal = None
        answers = session.hr_frames(lr_windows(20, 10, clock.jump))
        triton.failure = lambda count: None
        with pytest.raises(ServerError, match=r"lost 127.0.0.1:\d+ and found no server"):
            for _ in answers:
                pass
        gate.set()
        session.close()
        server.close()
