"""The fault matrix: whatever breaks in whatever kind of run, all of it comes out, or one line, then all.

Every cell breaks a run at a random point (seeded by its name), and compares what comes out, at once or after
a second run, with the frames of an undisturbed run.
"""

from __future__ import annotations

import errno
import io
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import av
import grpc
import numpy as np
import pytest
from client_fakes import FakeTriton, decoded, nearest, pictures, run_client, write_clip
from delay_proxy import Proxy

from mst_gan_client.serving import connection, opening, pace
from mst_gan_client.serving import server as server_module
from mst_gan_client.serving.transports import system
from mst_gan_client.video import encode

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

TITLE = "Fault matrix"
SCRIPT = Path(__file__).parents[2] / "client" / "upscale.py"
COUNT = 24
LOSSLESS, PIECES = ("--codec", "ffv1", "--pix-fmt", "bgr0"), ("--segment-frames", 4)
YUV = ("--pix-fmt", "yuv444p")
NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
WHOLE, LINE = "whole", "one line, then whole"
KILLED, UNWRITABLE = "killed, then whole", "unwritable"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Tenths of seconds instead of minutes."""
    for name, seconds in {
        "SILENT_FLOOR_S": 0.4, "FIRST_SILENT_FLOOR_S": 0.6, "LATE_FLOOR_S": 0.2, "FIRST_LATE_FLOOR_S": 0.3,
    }.items():  # fmt: skip
        monkeypatch.setattr(pace, name, seconds)
    monkeypatch.setattr(connection, "FIRST_PAUSE_S", 0.05)
    monkeypatch.setattr(connection, "FIRST_BUSY_PAUSE_S", 0.01)
    monkeypatch.setattr(server_module, "PROBE_AGAIN_TIMEOUT_S", 0.5)
    monkeypatch.setattr(opening, "WAIT_FOR_OTHERS_S", 5.0)


@cache
def undisturbed(first: int, count: int) -> list[np.ndarray]:
    """Frames of an undisturbed run over a part of the made-up clip, as the fake network gives them."""
    images = pictures(COUNT, 16, 24)[first : first + count]
    return [nearest(image[None, None].repeat(3, 1))[0] for image in images]


@dataclass
class Run:
    """One kind of input and output."""

    src: object
    dst: Path
    outputs: Callable[[bytes], list[list[np.ndarray]]]
    """The frames that were written, clip by clip."""
    expected: list[list[np.ndarray]]
    options: tuple[object, ...] = (*LOSSLESS, *PIECES)


def file_run(folder: Path) -> Run:
    write_clip(folder / "in.mkv", pictures(COUNT, 16, 24), codec="ffv1", pix_fmt="bgr0")
    out = folder / "out.mkv"
    return Run(folder / "in.mkv", out, lambda _: [decoded(out)], [undisturbed(0, COUNT)])


def folder_run(folder: Path) -> Run:
    (folder / "in").mkdir()
    for name, first in (("a", 0), ("b", 12)):
        images = pictures(COUNT, 16, 24)[first : first + 12]
        write_clip(folder / "in" / f"{name}.mkv", images, codec="ffv1", pix_fmt="bgr0")
    out = folder / "out"
    return Run(
        folder / "in",
        out,
        lambda _: [decoded(path) for path in sorted(out.iterdir())],
        [undisturbed(0, 12), undisturbed(12, 12)],
    )


def frames_of_y4m(data: bytes) -> list[np.ndarray]:
    with av.open(io.BytesIO(data), format="yuv4mpegpipe") as container:
        return [frame.to_ndarray() for frame in container.decode(video=0)]


@cache
def undisturbed_y4m(clip: bytes) -> list[np.ndarray]:
    """Likewise, in the pixels of y4m."""
    with TemporaryDirectory() as folder, FakeTriton() as triton:
        Path(folder, "in.mkv").write_bytes(clip)
        result = run_client(Path(folder, "in.mkv"), "-", "--url", triton.url, *YUV)
        return frames_of_y4m(result.stdout_bytes)


def pipe_run(folder: Path) -> Run:
    clip = write_clip(folder / "in.mkv", pictures(COUNT, 16, 24), codec="ffv1", pix_fmt="bgr0")
    expected = undisturbed_y4m(clip.read_bytes())
    return Run(clip, Path("-"), lambda data: [frames_of_y4m(data)], [expected], YUV)


def images_run(folder: Path) -> Run:
    (folder / "in").mkdir()
    for number, image in enumerate(pictures(COUNT, 16, 24)):
        with av.open(folder / "in" / f"shot_{number:03d}.png", "w", format="image2") as container:
            stream = container.add_stream("png", rate=1)
            stream.height, stream.width, stream.pix_fmt = *image.shape[:2], "rgb24"
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image)))
            container.mux(stream.encode(None))
    out = folder / "out"
    return Run(
        folder / "in",
        out,
        lambda _: [[decoded(path)[0] for path in sorted(out.iterdir())]],
        [undisturbed(0, COUNT)],
        PIECES,
    )


RUNS = {"file": file_run, "folder": folder_run, "pipe": pipe_run, "images": images_run}


@dataclass
class Scene:
    """Servers, the run, and when it breaks."""

    run: Run
    triton: FakeTriton
    other: FakeTriton | None
    at: int
    """The number of the request at which it breaks."""
    stack: ExitStack
    monkeypatch: pytest.MonkeyPatch
    over: threading.Event = field(default_factory=threading.Event)
    """Set when the fault has ended."""
    url: str = ""
    dst: Path | None = None
    patience_s: float = 1.0
    way: str = ""

    def options(self, is_disturbed: bool) -> list[object]:
        dst = (self.dst or self.run.dst) if is_disturbed else self.run.dst
        urls = [self.url or self.triton.url, *([self.other.url] if self.other else [])]
        patience_s = self.patience_s if is_disturbed else 60
        return [self.run.src, dst, "--url", ",".join(urls), "--patience", patience_s, *self.run.options]

    def when_reached(self, happens: Callable[[], object]) -> None:
        """Have something happen once, with the request at which it breaks; later ones wait for it."""
        begun, done = threading.Lock(), threading.Event()

        def happen() -> None:
            happens()
            done.set()

        def before(count: int) -> None:
            if count >= self.at:
                if begun.acquire(blocking=False):
                    threading.Thread(target=happen, daemon=True).start()
                done.wait(2)

        self.triton.before_answer = before


def silent(scene: Scene) -> None:
    def before(count: int) -> None:
        if count >= scene.at:
            scene.over.wait(60)

    def probe(count: int) -> None:
        if count == 0 and scene.triton.requests >= scene.at:
            scene.over.wait(60)

    scene.triton.before_answer, scene.triton.failure = before, probe


def slow(scene: Scene) -> None:
    scene.triton.before_answer = lambda count: time.sleep(0.005 if count < scene.at else 0.05)


def refused(scene: Scene) -> None:
    scene.when_reached(scene.triton.stop)


def reset(scene: Scene) -> None:
    proxy = scene.stack.enter_context(Proxy(scene.triton.port))
    scene.url = proxy.url
    scene.when_reached(proxy.reset)


def restart(scene: Scene) -> None:
    scene.triton.stop()
    time.sleep(0.2)
    scene.triton.start()


def restarted(scene: Scene) -> None:
    scene.patience_s = 30
    scene.when_reached(lambda: restart(scene))


def wrong_weights(scene: Scene) -> None:
    """Of one server: it comes back with them; of two: from the start."""

    def others(windows: np.ndarray) -> np.ndarray:
        return ~nearest(windows)

    def come_back_with_others() -> None:
        scene.triton.stop()
        scene.triton.network = others
        scene.triton.start()

    if scene.other:
        scene.triton.network = others
    else:
        scene.patience_s = 30
        scene.when_reached(come_back_with_others)


def no_memory_here(scene: Scene) -> None:
    def fail(*_: object) -> None:
        raise NO_SPACE

    scene.monkeypatch.setattr(system.os, "posix_fallocate", fail)


def no_memory_there(scene: Scene) -> None:
    error = (
        grpc.StatusCode.INTERNAL,
        "Failed to increase the shared memory pool size: No space left on device",
    )
    scene.triton.failure = lambda count: error if scene.at <= count < scene.at + 6 else None


def disk_full(scene: Scene) -> None:
    left, whole = [scene.at], encode.encode

    def until_full(hr_frames):
        for image in hr_frames:
            left[0] -= 1
            if left[0] == 0:
                raise NO_SPACE
            yield image

    def encode_some(container, hr_frames, *arguments):
        return whole(container, until_full(hr_frames), *arguments)

    scene.monkeypatch.setattr(encode, "encode", encode_some)


def read_only(scene: Scene) -> None:
    """Where not even root may write."""
    if scene.run.dst == Path("-"):
        scene.way = UNWRITABLE
    else:
        scene.dst = Path("/sys") / scene.run.dst.name


def killed(scene: Scene) -> None:
    scene.way = KILLED
    scene.triton.before_answer = lambda count: count >= scene.at and scene.over.wait(60)


FAULTS = {
    f"{name}, {company}": (fault, company)
    for name, fault in {
        "silent": silent,
        "slow": slow,
        "refused": refused,
        "reset": reset,
        "restarted": restarted,
        "wrong weights": wrong_weights,
        "no memory there": no_memory_there,
    }.items()
    for company in ("alone", "of two")
} | {
    "no memory here": (no_memory_here, "alone"),
    "disk full": (disk_full, "alone"),
    "read-only": (read_only, "alone"),
    "killed": (killed, "alone"),
    "killed, of two": (killed, "of two"),
}
MUST_END = {  # what each fault may end in, where only one end is right
    "slow, alone": WHOLE,
    "reset, alone": WHOLE,
    "restarted, alone": WHOLE,
    "no memory there, alone": WHOLE,
    "no memory here": WHOLE,
    "silent, alone": LINE,
    "refused, alone": LINE,
    "wrong weights, alone": LINE,
    "wrong weights, of two": LINE,
    "disk full": LINE,
    "read-only": LINE,
    "killed": KILLED,
    "killed, of two": KILLED,
} | {
    f"{name}, of two": WHOLE
    for name in ("silent", "slow", "refused", "reset", "restarted", "no memory there")
}


@pytest.mark.parametrize("kind", RUNS)
@pytest.mark.parametrize("name", FAULTS)
def test_fault(name, kind, tmp_path, monkeypatch, matrix_cell):
    ended = matrix_cell(TITLE, name, kind)
    folder = tmp_path / kind
    folder.mkdir()
    run = RUNS[kind](folder)
    fault, company = FAULTS[name]
    with ExitStack() as stack:
        other = stack.enter_context(FakeTriton()) if company == "of two" else None
        if other:  # so that the one that breaks has its share
            other.before_answer = lambda _: time.sleep(0.005)
        triton = stack.enter_context(FakeTriton(before_answer=lambda _: time.sleep(0.005)))
        at = random.Random(f"{name} {kind}").randint(2, 7)  # of 24, 16 at once: some are left to do
        scene = Scene(run, triton, other, at, stack, monkeypatch)
        stack.callback(scene.over.set)
        fault(scene)
        code, data, errors = disturbed_run(scene)
        end = KILLED if code < 0 else LINE if code else WHOLE
        if code > 0:
            assert_one_line(errors, len(run.expected))
        if code:
            mend(scene)
            result = run_client(*scene.options(is_disturbed=False))
            assert result.exit_code == 0, result.output
            data = result.stdout_bytes
    found = run.outputs(data)
    assert [len(frames) for frames in found] == [len(frames) for frames in run.expected]
    for frames, expected in zip(found, run.expected, strict=True):
        assert all(map(np.array_equal, frames, expected))
    assert not list(folder.rglob("*.part")), "what was needed to go on is gone"
    ended(end)
    assert end == MUST_END[name]


def disturbed_run(scene: Scene) -> tuple[int, bytes, str]:
    """Exit status, standard output and standard error of a run that something happens to."""
    options = scene.options(is_disturbed=True)
    command = list(map(str, [sys.executable, SCRIPT, *options]))
    if scene.way == KILLED:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while scene.triton.requests < scene.at:
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(0.1 * random.Random(scene.at).random())
        process.kill()
        return process.wait(), b"", ""
    if scene.way == UNWRITABLE:
        with open(os.devnull, "rb") as unwritable:
            done = subprocess.run(command, stdout=unwritable, stderr=subprocess.PIPE, check=False)
        return done.returncode, b"", done.stderr.decode()
    result = run_client(*options)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result.exit_code, result.stdout_bytes, result.stderr


def assert_one_line(errors: str, clips: int) -> None:
    """Of a whole run, or of each clip that failed."""
    assert "Traceback" not in errors
    lines = [line for line in errors.splitlines() if line.startswith("Error: ") or ".mkv: " in line]
    assert 1 <= len(lines) <= clips, errors


def mend(scene: Scene) -> None:
    """End the fault."""
    scene.over.set()
    scene.monkeypatch.undo()
    triton = scene.triton
    triton.before_answer, triton.failure, triton.network = lambda _: None, lambda _: None, nearest
    triton.stop()
    triton.start()
