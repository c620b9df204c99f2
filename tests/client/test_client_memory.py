"""One budget of memory over all queues of a run, and how large it is where nobody says."""

from __future__ import annotations

import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import click
import numpy as np
import pytest
from client_fakes import FakeTriton, decoded, ensemble_config, pictures, run_client, write_clip

import mst_gan_client.memory as memory
from mst_gan_client.frames.tiles import grid_for
from mst_gan_client.memory import ENCODER_FRAMES, control_group_limits, default_budget, plan_queues
from mst_gan_client.options import byte_count
from mst_gan_client.pipeline import Options, Pipeline, shapes_of
from mst_gan_client.record import Record
from mst_gan_client.serving.contract import contract_from_config
from mst_gan_client.serving.identity import Identity
from mst_gan_client.serving.session import Session
from mst_gan_client.video.color import Color
from mst_gan_client.video.encode import encoding_from_options
from mst_gan_client.video.picture import Frame, Picture, Range

pytestmark = pytest.mark.slow

MB = 1 << 20
CONTRACT = contract_from_config(ensemble_config(), "here")


class Server:
    """Answers with frames of zeros, which take address space and no memory; the first answer comes last."""

    def __init__(self, address, pool, first_may_come):
        self.address, self.contract, self.in_flight, self.probe_s = address, CONTRACT, 16, 0.1
        self._pool, self._first_may_come = pool, first_may_come

    def check(self):
        pass

    def identity(self):
        return Identity({}, np.zeros(1, np.uint8))

    def share_memory(self, lr_shape, transport):
        return "nothing"

    def ask(self, lr_window, done, tag):
        message = lr_window.tobytes()  # as gRPC does

        def answer():
            if not lr_window[1].any():
                self._first_may_come.wait(5)  # everything else is answered, and waits for its turn
            _, height, width, _ = lr_window.shape
            done(np.zeros((4 * height, 4 * width, 3), np.uint8), None)
            assert message

        return self._pool.submit(answer).cancel


class Clip:
    """A clip of so many frames of a size; the first is black."""

    def __init__(self, count, size):
        self.path, self.damaged, self.refused = "clip", 0, 0
        self._count, self._size = count, size

    def frames(self, wanted, known, skip, offset, lead):
        for t in range(self._count):
            yield Frame(np.full((*self._size, 3), t and 1, np.uint8), t)


def peak_of(budget, size, count, encoder="ffv1"):
    """The most bytes that the queues of a run with four servers hold, and what was planned."""
    first_may_come = threading.Event()
    picture = Picture(size, Fraction(25), Fraction(1, 25), Color(1, False, 2, 2), None, None)
    shapes = shapes_of(picture, CONTRACT, None)
    options = Options(encoding_from_options(encoder, None, None, None), 100, 255.0, Range())
    with ThreadPoolExecutor(64) as pool:
        session = Session([Server(f"gpu-{n}:8001", pool, first_may_come) for n in range(4)])
        plan = plan_queues(
            budget, shapes.layout.padded, shapes.layout.grid, CONTRACT.window, CONTRACT.scale,
            session.in_flight, options.encoding.codec.encoder,
        )  # fmt: skip
        session.limit(plan.windows)
        tracemalloc.start()
        try:
            feed = Pipeline(Clip(count, size), session, shapes, options, Record(), plan)
            got = 0
            for _ in feed:
                first_may_come.set()
                got += 1
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            first_may_come.set()
            tracemalloc.stop()
            feed.close()
    assert got == count
    return peak, plan


@pytest.mark.parametrize("budget", [3 * 1024 * MB, 6 * 1024 * MB])
def test_four_servers_at_720p(budget):
    """Six gigabytes would be held by counts alone."""
    peak, plan = peak_of(budget, (720, 1280), 90)
    hr_bytes = 3 * 2880 * 5120
    queues = budget - ENCODER_FRAMES["ffv1"] * hr_bytes
    assert plan.bytes <= budget
    assert peak <= queues, f"{peak / MB:.0f} MB held, {queues / MB:.0f} MB planned"
    assert peak > queues / 3  # and what may be used is used
    assert plan.windows >= 16


def test_without_the_limit_it_would_not_hold(monkeypatch):
    """So the test above can fail."""
    monkeypatch.setattr(Session, "limit", lambda self, windows: None)
    peak, _ = peak_of(3 * 1024 * MB, (720, 1280), 90)
    assert peak > 3 * 1024 * MB


def test_tiles(monkeypatch):
    """Of 1080p in four tiles."""
    budget = 6 * 1024 * MB
    peak, plan = peak_of(budget, (1080, 1920), 24)
    assert plan.bytes <= budget and peak <= budget - ENCODER_FRAMES["ffv1"] * 3 * 4320 * 7680


def test_the_plan_grows_with_the_budget():
    grid = grid_for((720, 1280), (720, 1280), 4)
    before = None
    for budget in (1, 2 << 30, 4 << 30, 8 << 30, 16 << 30, 64 << 30):
        plan = plan_queues(budget, (720, 1280), grid, 3, 4, 64, "libx264")
        numbers = (plan.lr_frames, plan.windows, plan.hr_frames)
        assert min(numbers) >= 1 and (
            before is None or all(a >= b for a, b in zip(numbers, before, strict=True))
        )
        assert plan.bytes <= budget or numbers == (1, 1, 1)
        before = numbers
    assert before == (4, 128, 4)


def test_a_budget_that_is_too_small_is_said(tmp_path, caplog):
    """It works all the same, one frame at a time."""
    clip = write_clip(tmp_path / "in.mp4", pictures(12))
    with FakeTriton() as triton:
        result = run_client(clip, tmp_path / "out.mp4", "--url", triton.url, "--memory", "100K")
        assert triton.most_under_way == 1
    assert result.exit_code == 0, result.output
    assert "one at a time is under way, see --memory" in caplog.text
    assert len(decoded(tmp_path / "out.mp4")) == 12


def test_the_next_clip_has_its_own_plan(tmp_path, monkeypatch):
    """The limit of a large clip does not slow down the small one after it."""
    (tmp_path / "in").mkdir()
    write_clip(tmp_path / "in" / "a.mp4", pictures(30, 256, 256))
    write_clip(tmp_path / "in" / "b.mp4", pictures(60, 16, 16))
    most = {}

    def note(count):
        size = triton.shapes[-1][2]
        most[size] = max(most.get(size, 0), triton.under_way)

    gate = threading.Semaphore(1)
    with FakeTriton(before_answer=lambda count: (gate.acquire(timeout=0.02), note(count))) as triton:
        result = run_client(tmp_path / "in", tmp_path / "out", "--url", triton.url, "--memory", "130M")
    assert result.exit_code == 0, result.output
    assert most[256] <= 4 < most[16]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("100", 100),
        ("500M", 500 << 20),
        ("2G", 2 << 30),
        ("1.5GiB", 3 << 29),
        ("64k", 64 << 10),
        ("1T", 1 << 40),
    ],
)
def test_amounts_of_memory(text, value):
    assert byte_count(text) == value


@pytest.mark.parametrize("text", ["", "0", "much", "-1G", "2X", "G"])
def test_what_is_no_amount_of_memory(text):
    with pytest.raises(click.BadParameter, match="expected an amount of memory such as 500M or 2G, found"):
        byte_count(text)


@pytest.mark.parametrize(
    ("own", "files", "limits"),
    [
        (
            "0::/user/run",
            {"memory.max": "max", "user/memory.max": "8000", "user/run/memory.max": "9000"},
            [8000, 9000],
        ),
        ("0::/elsewhere/docker", {"memory.max": "7000"}, [7000]),
        (
            "5:cpu,cpuacct:/a\n4:memory:/a/b",
            {"memory/memory.limit_in_bytes": str(2**62), "memory/a/b/memory.limit_in_bytes": "5000"},
            [5000, 2**62],
        ),
        ("", {}, []),
    ],
)
def test_limits_of_control_groups(tmp_path, own, files, limits):
    (tmp_path / "cgroup").write_text(own)
    for name, text in files.items():
        (tmp_path / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fs" / name).write_text(text + "\n")
    assert sorted(control_group_limits(tmp_path / "fs", tmp_path / "cgroup")) == limits


def test_the_default_is_a_quarter_of_what_there_is(monkeypatch):
    monkeypatch.setattr(memory, "control_group_limits", lambda: [4000])
    assert default_budget() == 1000
    monkeypatch.setattr(memory, "control_group_limits", list)
    assert default_budget() > 100 * MB
