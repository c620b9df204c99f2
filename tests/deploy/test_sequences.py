"""Streams on the embedded server: states by correlation id, kept apart, and freed."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpcclient
import tritonclient.http as httpclient
from client_fakes import LOSSLESS, decoded, pictures, run_client, write_clip
from server_load import executions
from toy_stream import history, sequence_answers, stream_repository
from tritonclient.utils import InferenceServerException

from deploy.embedded.server import TritonServer
from export import spec

pytestmark = [pytest.mark.server, pytest.mark.timeout(180)]

Array = np.ndarray[Any, Any]
SIZE = (32, 48)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    folder = tmp_path_factory.mktemp("stream")
    with TritonServer(stream_repository(folder), folder / "triton.log") as server:
        yield server


@pytest.fixture(scope="module")
def client(server: TritonServer) -> Iterator[grpcclient.InferenceServerClient]:
    with grpcclient.InferenceServerClient(server.grpc_url) as client:
        yield client


def frames(count: int, seed: int, size: tuple[int, int] = SIZE) -> list[Array]:
    rng = np.random.default_rng(seed)
    return list(rng.integers(0, 256, (count, *size, 3), np.uint8))


def ask(client: Any, frame: Array, sequence: int | str, *, start: bool = False, end: bool = False) -> Array:
    module = grpcclient if isinstance(client, grpcclient.InferenceServerClient) else httpclient
    tensor = module.InferInput(spec.LR_FRAME.name, [1, *frame.shape], spec.LR_FRAME.dtype)
    tensor.set_data_from_numpy(frame[None])
    flags = {"sequence_id": sequence, "sequence_start": start, "sequence_end": end}
    answer: Array = client.infer(spec.STREAM_ENSEMBLE.name, [tensor], **flags).as_numpy(spec.HR_FRAME.name)
    return answer[0]


def ask_all(client: Any, images: list[Array], sequence: int | str) -> list[Array]:
    last = len(images) - 1
    return [ask(client, image, sequence, start=t == 0, end=t == last) for t, image in enumerate(images)]


def held(server: TritonServer) -> int:
    """States in all instances, as the metric says."""
    return round(
        sum(map(float, re.findall(r"^mst_gan_sequences{.*} (\S+)$", server.metrics(), re.MULTILINE)))
    )


def equal(found: list[Array], images: list[Array]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(found, history(images), strict=True))


@pytest.mark.parametrize("sequence", [7, "a stream by name"])
def test_a_sequence_remembers(client: Any, server: TritonServer, sequence: int | str) -> None:
    for seed in (0, 1):  # the same id again: it begins anew
        images = frames(6, seed)
        assert equal(ask_all(client, images, sequence), images)
    assert held(server) == 0


def test_over_http(server: TritonServer) -> None:
    with httpclient.InferenceServerClient(server.http_url) as client:
        images = frames(4, 2)
        assert equal(ask_all(client, images, 8), images)


def test_streams_that_begin_at_any_time_share_batches_and_no_state(client: Any, server: TritonServer) -> None:
    """A sequence that starts has a state of one pixel, and meets others in the middle of theirs.

    Two have frames of another size. More come than instances hold: these wait.
    """
    count = spec.SEQUENCES_PER_INSTANCE * len(spec.INSTANCE_GROUPS) + 4
    lengths = [3 + 2 * (index % 5) for index in range(count)]
    streams = [frames(n, 10 + k, (16, 16) if k < 2 else SIZE) for k, n in enumerate(lengths)]
    done, runs = executions(server, spec.STREAM_GENERATOR.name)
    with ThreadPoolExecutor(count) as pool:
        answers = list(pool.map(lambda k: ask_all(client, streams[k], 100 + k), range(count)))
    for found, images in zip(answers, streams, strict=True):
        assert equal(found, images)
    after, more_runs = executions(server, spec.STREAM_GENERATOR.name)
    assert after - done == sum(lengths)
    assert more_runs - runs < after - done  # several streams in one batch
    assert held(server) == 0


def test_what_is_out_of_order_is_refused(client: Any, server: TritonServer) -> None:
    image = frames(1, 3)[0]
    with pytest.raises(InferenceServerException, match="must specify the START flag on the first request"):
        ask(client, image, 20)
    ask(client, image, 20, start=True, end=True)
    with pytest.raises(InferenceServerException, match="must specify the START flag on the first request"):
        ask(client, image, 20)
    with pytest.raises(InferenceServerException, match="must specify a non-zero or non-empty correlation ID"):
        ask(client, image, 0, start=True)


def test_frames_of_another_size_end_a_sequence(client: Any, server: TritonServer) -> None:
    images = frames(3, 4)
    ask(client, images[0], 30, start=True)
    assert held(server) == 2  # of both stages
    with pytest.raises(InferenceServerException, match="expected frames of one size in a sequence"):
        ask(client, frames(1, 5, (16, 16))[0], 30)
    with pytest.raises(InferenceServerException, match="begin a new one with START"):
        ask(client, images[1], 30)
    assert equal(ask_all(client, images, 30), images)
    assert held(server) == 0


def test_a_size_that_the_network_does_not_take_ends_a_sequence(client: Any) -> None:
    images = frames(2, 6)
    ask(client, images[0], 31, start=True)
    with pytest.raises(InferenceServerException, match="expected height and width of lr_frame in multiples"):
        ask(client, images[1][:30], 31)
    with pytest.raises(InferenceServerException, match="begin a new one with START"):
        ask(client, images[1], 31)
    assert equal(ask_all(client, images, 31), images)


def test_two_writers_on_one_id(client: Any, server: TritonServer) -> None:
    """The second START ends the first sequence; each writer gets answers of the second, none is mixed up."""
    mine, theirs = frames(2, 7), frames(3, 8)
    ask(client, mine[0], 40, start=True)
    first = ask(client, theirs[0], 40, start=True)
    shared = [first, ask(client, mine[1], 40), ask(client, theirs[1], 40, end=True)]
    assert equal(shared, [theirs[0], mine[1], theirs[1]])
    assert held(server) == 0


def test_the_ensemble_publishes_what_a_client_needs(client: Any) -> None:
    config = client.get_model_config(spec.STREAM_ENSEMBLE.name).config
    published = {name: value.string_value for name, value in config.parameters.items()}
    assert published.items() >= spec.STREAM_PARAMETERS.items()
    assert published[spec.WEIGHTS_NAME] == "toy_stream"


def test_a_clip_through_the_client(server: TritonServer, tmp_path: Path) -> None:
    """Several sequences of one clip at once, each begun early."""
    clip = write_clip(tmp_path / "in.mkv", pictures(40), codec="ffv1", pix_fmt="bgr0")
    out = tmp_path / "out.mkv"
    options = ("--url", server.grpc_url, "--segment-frames", 10, *LOSSLESS)
    result = run_client(clip, out, *options)
    assert result.exit_code == 0, result.output
    expected = sequence_answers(decoded(clip), 10, int(spec.STREAM_PARAMETERS["warmup"]))
    assert all(np.array_equal(a, b) for a, b in zip(decoded(out), expected, strict=True))
    assert held(server) == 0


def test_a_client_that_vanishes_leaves_nothing(tmp_path: Path) -> None:
    """After a while without frames the states are freed, and Triton's own slots with them."""
    models = stream_repository(tmp_path)
    for stage in spec.STREAM_STAGES:
        path = models / stage.name / "config.pbtxt"
        text = path.read_text()
        assert str(spec.MAX_IDLE_US) in text
        path.write_text(text.replace(str(spec.MAX_IDLE_US), "500000"))
    images = frames(2, 9)
    with TritonServer(models, tmp_path / "triton.log") as server:
        with grpcclient.InferenceServerClient(server.grpc_url) as client:
            ask(client, images[0], 50, start=True)
            log = tmp_path / "triton.log"
            while len(re.findall(r"freed sequence 50, idle for 0.5 s", log.read_text())) < 2:
                time.sleep(0.05)
            with pytest.raises(InferenceServerException):
                ask(client, images[1], 50)
            assert equal(ask_all(client, images, 50), images)
        assert held(server) == 0
