"""The client with a model that keeps a state: every promise that it gives for windows, for sequences."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import grpc
import numpy as np
import pytest
from client_fakes import LOSSLESS, FakeTriton, decoded, ensemble_config, pictures, run_client, write_clip
from fake_stream import WARMUP, FakeStream
from toy_stream import sequence_answers

from mst_gan_client import Upscaler
from mst_gan_client.frames.sequences import LEAST_FRAMES, MOST_FRAMES, sequence_length, sequences

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

COUNT, SEGMENT = 60, 12
SCRIPT = Path(__file__).parents[2] / "client" / "upscale.py"
QUEUE_FULL = grpc.StatusCode.UNAVAILABLE, "Exceeds maximum queue size"


@pytest.fixture
def triton():
    with FakeStream() as server:
        yield server


@pytest.fixture
def clip(tmp_path):
    return write_clip(tmp_path / "in.mkv", pictures(COUNT), codec="ffv1", pix_fmt="bgr0")


def command(clip, out, *tritons, segment=SEGMENT):
    urls = ",".join(triton.url for triton in tritons)
    return (clip, out, "--url", urls, "--segment-frames", segment, *LOSSLESS)


def upscaled(clip, out, *tritons, options=(), segment=SEGMENT):
    result = run_client(*command(clip, out, *tritons, segment=segment), *options)
    assert result.exit_code == 0, result.output
    return decoded(out)


def expected(images, segment=SEGMENT, cuts=()):
    return sequence_answers(images, segment, WARMUP, cuts)


def same(found, wanted):
    return len(found) == len(wanted) and all(map(np.array_equal, found, wanted))


def test_a_clip_in_sequences(clip, tmp_path, triton, caplog):
    caplog.set_level("INFO")
    assert same(upscaled(clip, tmp_path / "out.mkv", triton), expected(decoded(clip)))
    assert "mst_gan_stream upscales; frames pass through gRPC, in sequences" in caplog.text
    assert len(triton.begun) == COUNT // SEGMENT and not triton.clashes and not triton.states
    assert triton.requests == COUNT + WARMUP * (COUNT // SEGMENT - 1)
    assert triton.shapes == [(1, 32, 48, 3)] * triton.requests  # a third of a window's bytes


def test_a_cut_begins_a_sequence_that_does_not_look_back(tmp_path, triton):
    images = pictures(20) + [255 - image for image in pictures(20)]
    clip = write_clip(tmp_path / "in.mkv", images, codec="ffv1", pix_fmt="bgr0")
    assert same(upscaled(clip, tmp_path / "out.mkv", triton), expected(images, cuts=(20,)))


def test_tiles(tmp_path, triton):
    """Each tile is a sequence of its own; where tiles agree, as here in one color, so does the whole."""
    triton.config.parameters["max_size"].string_value = "64x64"
    images = [np.full((96, 96, 3), 3 * t, np.uint8) for t in range(20)]
    clip = write_clip(tmp_path / "in.mkv", images, codec="ffv1", pix_fmt="bgr0")
    assert same(upscaled(clip, tmp_path / "out.mkv", triton, segment=10), expected(images, 10))
    assert len(triton.begun) == 4 * 2


@pytest.mark.parametrize("kind", ["dies", "forgets", "is busy", "fails once"])
def test_sequences_that_are_lost_are_begun_again(clip, tmp_path, kind):
    """On another server, or on the same one; the answers are those of one undisturbed run."""
    with FakeStream() as one, FakeStream() as two:

        def happen(count):
            if count == 30:
                one.forget() if kind == "forgets" else threading.Thread(target=one.stop).start()

        if kind in ("dies", "forgets"):
            one.before_answer = happen
        elif kind == "is busy":
            one.failure = lambda count: QUEUE_FULL if 20 < count < 40 else None
        else:
            one.failure = lambda count: (
                (grpc.StatusCode.INTERNAL, "Stub process is not healthy") * (count == 20)
            )
        options = ("--patience", 30)
        assert same(upscaled(clip, tmp_path / "out.mkv", one, two, options=options), expected(decoded(clip)))
        assert not one.clashes and not two.clashes


def test_a_server_that_was_started_again_is_given_the_sequence_anew(clip, tmp_path, triton):
    triton.before_answer = lambda count: triton.forget() if count == 30 else None
    assert same(upscaled(clip, tmp_path / "out.mkv", triton), expected(decoded(clip)))
    assert triton.requests > COUNT + WARMUP * (COUNT // SEGMENT - 1)


def test_what_a_server_refuses_ends_the_run_in_one_line(clip, tmp_path, triton):
    triton.failure = lambda count: (grpc.StatusCode.INVALID_ARGUMENT, "no such frame") if count > 20 else None
    result = run_client(*command(clip, tmp_path / "out.mkv", triton))
    assert result.exit_code == 1
    assert "refused sequence " in result.output.splitlines()[-1] and "no such frame" in result.output


def test_killed_at_random_points(clip, tmp_path, triton):
    """However often it is killed, the frames are bit for bit those of one undisturbed run."""
    out, rng, kills = tmp_path / "out.mkv", random.Random(1), 0
    triton.before_answer = lambda count: time.sleep(0.01)
    while not out.exists() and kills < 50:
        until = triton.requests + rng.randint(40, 90)  # the sequences under way end at about the same time
        words = map(str, (sys.executable, SCRIPT, *command(clip, out, triton)))
        process = subprocess.Popen(list(words), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and triton.requests < until:
            time.sleep(0.005)
        if process.poll() is None:
            process.kill()
            kills += 1
        process.wait()
    assert kills > 0
    assert same(decoded(out), expected(decoded(clip)))


def test_two_clients_at_once(clip, tmp_path, triton):
    with triton:
        threads, found = [], {}
        for name in ("one", "two"):
            out = tmp_path / f"{name}.mkv"
            words = list(map(str, (sys.executable, SCRIPT, *command(clip, out, triton))))
            thread = threading.Thread(target=lambda n=name, w=words: found.update({n: subprocess.call(w)}))
            threads.append(thread)
            thread.start()
        for thread in threads:
            thread.join()
    assert found == {"one": 0, "two": 0} and not triton.clashes
    for name in found:
        assert same(decoded(tmp_path / f"{name}.mkv"), expected(decoded(clip)))


def test_joined_shards_are_one_run(clip, tmp_path, triton):
    out = tmp_path / "out.mkv"
    for shard in ("1/2", "2/2"):
        result = run_client(*command(clip, out, triton), "--shard", shard)
        assert result.exit_code == 0, result.output
    result = run_client("join", clip, out)
    assert result.exit_code == 0, result.output
    assert same(decoded(out), expected(decoded(clip)))


@pytest.mark.parametrize(
    ("options", "model"),
    [
        ((), "mst_gan_stream"),
        (("--mode", "stream"), "mst_gan_stream"),
        (("--mode", "window"), "mst_gan"),
        (("--transport", "system"), "mst_gan"),
        (("--model", "mst_gan"), "mst_gan"),
    ],
)
def test_which_model_is_taken(clip, tmp_path, caplog, options, model):
    caplog.set_level("INFO")
    with FakeStream(also=ensemble_config()) as triton:
        run_client(*command(clip, tmp_path / "out.mkv", triton), *options, "--max-frames", 1)
    assert f"{model} upscales" in caplog.text


def test_a_model_that_is_not_served_is_named(clip, tmp_path, triton):
    with FakeTriton() as windows:
        result = run_client(*command(clip, tmp_path / "out.mkv", windows), "--mode", "stream")
        assert result.exit_code == 1 and "has not loaded model 'mst_gan_stream'" in result.output
        result = run_client(*command(clip, tmp_path / "out.mkv", windows, triton))
        assert result.exit_code == 1 and "name what all have with --mode" in result.output
    result = run_client(
        *command(clip, tmp_path / "out.mkv", triton), "--mode", "stream", "--transport", "cuda"
    )
    assert result.exit_code == 1 and "sequences pass through gRPC alone" in result.output


def test_an_unfinished_run_is_not_resumed_by_another_model(clip, tmp_path, triton):
    out = tmp_path / "out.mkv"
    triton.failure = lambda count: (grpc.StatusCode.INVALID_ARGUMENT, "no") if count > 40 else None
    assert run_client(*command(clip, out, triton), "--memory", "1").exit_code == 1
    assert Path(f"{out}.part").exists()
    with FakeTriton() as windows:
        result = run_client(*command(clip, out, windows))
    assert result.exit_code == 1 and "--restart" in result.output


def test_the_library(triton):
    images = pictures(70)
    with Upscaler(triton.url, model="mst_gan_stream") as upscaler:
        assert same(list(upscaler.upscale(images)), expected(images, MOST_FRAMES))
        assert same(list(upscaler.upscale(images[:1])), expected(images[:1]))


def test_a_budget_of_memory_bounds_the_sequences_under_way(clip, tmp_path, triton):
    triton.before_answer = lambda count: time.sleep(0.002)
    assert same(
        upscaled(clip, tmp_path / "out.mkv", triton, options=("--memory", "1M")), expected(decoded(clip))
    )
    assert triton.most_under_way == 1


def test_the_length_of_sequences():
    assert sequence_length(3 * 1280 * 720, 100) == MOST_FRAMES
    assert sequence_length(3 * 1280 * 720, 101) == 34  # three of 34, 34, 33
    assert sequence_length(3 * 5120 * 2880, 100) == 20  # what a GB holds: 24, in equal parts
    assert sequence_length(1 << 40, 100) == LEAST_FRAMES
    assert sequence_length(1000, 7) == 7


def test_sequences_of_a_part():
    """As a resumed run has them: frames before the first one that is wanted only warm up."""
    pieces = list(sequences(range(100, 120), lambda index: index % 8 == 5, 4, start=5, stop=15))
    assert pieces == [
        (list(range(101, 113)), 4),
        (list(range(109, 115)), 4),
    ]
