"""A run that was stopped, in whatever way, goes on where it was and gives what an undisturbed run gives."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from client_fakes import (
    FakeTriton,
    decoded,
    frame_times,
    nearest,
    packets,
    pictures,
    run_client,
    sum_of_window,
    write_clip,
)

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "client" / "upscale.py"
COUNT = 60


class Dam:
    """A network that answers a number of windows and holds the rest: no machine is too fast or too slow.

    A window that is sent again, because the machine stood still for a while, counts once.
    """

    def __init__(self) -> None:
        self.limit = 30  # of the 60 windows
        self.opened = threading.Event()
        self.windows: dict[bytes, int] = {}
        """Those that came, in the order of their coming."""

    def __call__(self, windows: np.ndarray) -> np.ndarray:
        if windows.shape[2:4] != (32, 48):  # the probe
            return nearest(windows)
        place = self.windows.setdefault(windows.tobytes(), len(self.windows))
        while place >= self.limit and not self.opened.wait(0.01):
            pass
        return nearest(windows)


@pytest.fixture
def dam():
    dam = Dam()
    yield dam
    dam.opened.set()


@pytest.fixture
def triton(dam):
    with FakeTriton(network=dam) as server:
        yield server
        dam.opened.set()


@pytest.fixture
def clip(tmp_path):
    return write_clip(tmp_path / "in.mp4", pictures(COUNT), audio=True)


def start(clip, out, triton, *options):
    command = [sys.executable, SCRIPT, clip, out, "--url", triton.url, "--segment-frames", "7", *options]
    return subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for(process, path):
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def kill(process, dam):
    process.kill()
    process.wait()
    dam.opened.set()


@pytest.mark.parametrize("codec", ["h264", "hevc", "av1", "ffv1"])
def test_killed_at_random_points(tmp_path, dam, triton, clip, codec):
    """However often it is killed, the frames are bit for bit those of one undisturbed run."""
    calm, out = tmp_path / "calm.mkv", tmp_path / "out.mkv"
    dam.limit = 2 * COUNT
    result = run_client(clip, calm, "--url", triton.url, "--segment-frames", 7, "--codec", codec)
    assert result.exit_code == 0, result.output
    requests = triton.requests
    rng = random.Random(codec)
    kills = 0
    while not out.exists() and kills < 50:
        dam.windows.clear()
        dam.limit = rng.randint(10, 40)
        process = start(clip, out, triton, "--codec", codec)
        while process.poll() is None and len(dam.windows) < dam.limit:
            time.sleep(0.01)
        time.sleep(0.2 * rng.random())
        if process.poll() is None:
            process.kill()
            process.wait()
            kills += 1
    assert kills > 0
    assert triton.requests > requests + COUNT  # it was in the middle of something
    assert frame_times(out) == frame_times(clip)
    assert packets(out, "audio") == packets(calm, "audio")
    assert all((one == other).all() for one, other in zip(decoded(out), decoded(calm), strict=True))


@pytest.mark.parametrize("codec", ["h264", "hevc", "av1"])
def test_encoders_give_the_same_for_the_same(tmp_path, codec):
    """Otherwise a piece that is made again would not fit its first making."""
    clip = write_clip(tmp_path / "in.mkv", pictures(24, 60, 104), codec="ffv1", pix_fmt="bgr0")
    first, again = tmp_path / "first.mkv", tmp_path / "again.mkv"
    with FakeTriton() as triton:
        for out in (first, again):
            arguments = (clip, out, "--url", triton.url, "--segment-frames", 8, "--codec", codec)
            assert run_client(*arguments).exit_code == 0
    assert packets(first, "video") == packets(again, "video")


def test_finished_pieces_are_not_made_again(tmp_path, dam, triton, clip):
    out = tmp_path / "out.mp4"
    process = start(clip, out, triton)
    wait_for(process, tmp_path / "out.mp4.part" / "000002.segment")
    kill(process, dam)
    finished = 7 * len(list((tmp_path / "out.mp4.part").glob("*.record")))
    dam.windows.clear()
    assert run_client(clip, out, "--url", triton.url, "--segment-frames", 7).exit_code == 0
    assert len(dam.windows) == COUNT - finished


def test_ctrl_c(tmp_path, dam, triton, clip):
    out = tmp_path / "out.mp4"
    process = start(clip, out, triton)
    wait_for(process, tmp_path / "out.mp4.part" / "000001.segment")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    dam.opened.set()
    assert process.returncode == 130
    assert "stopped; what is finished is kept, the same command goes on from there" in errors
    assert "Traceback" not in errors
    assert run_client(clip, out, "--url", triton.url, "--segment-frames", 7).exit_code == 0
    assert frame_times(out) == frame_times(clip)


@pytest.fixture
def interrupted(tmp_path, dam, triton, clip):
    """The output of a run that was stopped after its first piece."""
    out = tmp_path / "out.mp4"
    process = start(clip, out, triton)
    wait_for(process, tmp_path / "out.mp4.part" / "000000.segment")
    kill(process, dam)
    return out


def test_another_input_is_not_mixed_in(tmp_path, triton, clip, interrupted):
    write_clip(clip, pictures(COUNT + 1), audio=True)
    result = run_client(clip, interrupted, "--url", triton.url, "--segment-frames", 7)
    assert result.exit_code == 1
    assert f"{interrupted}.part holds an unfinished run with another input: expected" in result.output
    assert "start over with --restart" in result.output
    again = run_client(clip, interrupted, "--url", triton.url, "--segment-frames", 7, "--restart")
    assert again.exit_code == 0, again.output
    assert len(frame_times(interrupted)) == COUNT + 1


@pytest.mark.parametrize(
    ("option", "what"),
    [("--crf=30", "encoding"), ("--segment-frames=8", "segment length"), ("--scene-threshold=9", "scene")],
)
def test_other_settings_are_not_mixed_in(triton, clip, interrupted, option, what):
    result = run_client(clip, interrupted, "--url", triton.url, "--segment-frames", 7, option)
    assert result.exit_code == 1
    assert f"holds an unfinished run with another {what}" in result.output


def test_another_model_is_not_mixed_in(triton, clip, interrupted):
    triton.config.parameters["checkpoint"].string_value = "newer"
    result = run_client(clip, interrupted, "--url", triton.url, "--segment-frames", 7)
    assert result.exit_code == 1
    assert "holds an unfinished run with another model parameters" in result.output


def test_other_weights_are_not_mixed_in(triton, clip, interrupted):
    triton.network = sum_of_window
    result = run_client(clip, interrupted, "--url", triton.url, "--segment-frames", 7)
    assert result.exit_code == 1
    assert "holds an unfinished run with other weights: expected weights (probe " in result.output
    assert f" at {triton.url}; start over with --restart, or serve the model of that" in result.output
    triton.network = nearest
    result = run_client(clip, interrupted, "--url", triton.url, "--segment-frames", 7)
    assert result.exit_code == 0, result.output


def test_every_server_of_a_run_may_go_on_with_it(tmp_path, dam, triton, clip):
    """One whose weights were not among those of the run may not, whoever else is there."""
    out = tmp_path / "out.mp4"
    with FakeTriton(network=sum_of_window) as other, FakeTriton(network=lambda x: ~nearest(x)) as third:
        process = start(clip, out, triton, "--url", f"{triton.url},{other.url}", "--allow-mixed-weights")
        wait_for(process, tmp_path / "out.mp4.part" / "000000.segment")
        kill(process, dam)
        both = f"{other.url},{third.url}"
        result = run_client(clip, out, "--url", both, "--segment-frames", 7, "--allow-mixed-weights")
        assert result.exit_code == 1
        assert f" at {third.url}; start over with --restart" in result.output
        result = run_client(clip, out, "--url", other.url, "--segment-frames", 7)
        assert result.exit_code == 0, result.output


def test_a_server_that_comes_back_with_other_weights(tmp_path, triton, clip):
    out = tmp_path / "out.mp4"

    def change(count):
        if count == 30:
            triton.network = sum_of_window
            triton.stop()

    triton.before_answer = change
    threading.Timer(2.0, triton.start).start()
    result = run_client(clip, out, "--url", triton.url, "--segment-frames", 7)
    assert result.exit_code == 1
    assert (
        f"expected the weights of before at {triton.url}, found that it came back with oth" in result.output
    )


def test_a_server_that_cannot_answer_at_all(tmp_path, triton, clip):
    def fail(windows):
        raise RuntimeError("out of memory")

    triton.network = fail
    result = run_client(clip, tmp_path / "out.mp4", "--url", triton.url)
    assert result.exit_code == 1
    assert f"expected an answer to a small probe from {triton.url}, found: " in result.output
    assert "out of memory; see the server's log" in result.output


def test_a_damaged_manifest(triton, clip, interrupted):
    manifest = Path(f"{interrupted}.part") / "manifest.json"
    manifest.write_text(manifest.read_text()[:20])
    result = run_client(clip, interrupted, "--url", triton.url, "--segment-frames", 7)
    assert result.exit_code == 1
    assert "manifest.json is damaged: start over with --restart" in result.output


def test_two_runs_at_once(tmp_path, dam, triton, clip):
    out = tmp_path / "out.mp4"
    process = start(clip, out, triton)
    wait_for(process, tmp_path / "out.mp4.part" / "manifest.json")
    result = run_client(clip, out, "--url", triton.url)
    kill(process, dam)
    assert result.exit_code == 1
    assert f"another run is writing {out}: wait for it, or stop it" in result.output
    assert os.path.exists(f"{out}.part")
