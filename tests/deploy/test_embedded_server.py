"""The embedded server, started for real: what goes over the wire, and what does not take it down."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import tritonclient.grpc as grpcclient
import tritonclient.http as httpclient
from server_load import IN_FLIGHT, executions
from toy_models import build_busy_repository
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from deploy import doctor
from deploy.embedded.server import ServerError, TritonServer
from export import spec

pytestmark = [pytest.mark.server, pytest.mark.timeout(180)]

SIZE = (64, 64)
Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def client(toy_server: TritonServer) -> Iterator[grpcclient.InferenceServerClient]:
    with grpcclient.InferenceServerClient(toy_server.grpc_url) as client:
        yield client


@pytest.fixture(scope="module")
def windows() -> list[Array]:
    """Different noise each, so that an answer given to the wrong request cannot pass."""
    rng = np.random.default_rng(7)
    return [rng.integers(0, 256, spec.LR_WINDOW.shape(1, SIZE), np.uint8) for _ in range(2 * IN_FLIGHT)]


def upscale(client: grpcclient.InferenceServerClient, window: Array) -> Array:
    lr_window = grpcclient.InferInput(spec.LR_WINDOW.name, window.shape, np_to_triton_dtype(window.dtype))
    lr_window.set_data_from_numpy(window)
    answer = client.infer(spec.ENSEMBLE.name, [lr_window], client_timeout=60)
    hr_frame: Array = answer.as_numpy(spec.HR_FRAME.name)
    return hr_frame


def upscale_all(client: grpcclient.InferenceServerClient, windows: Sequence[Array]) -> list[Any]:
    """Answers or errors, in order, with many requests in flight."""

    def answer(window: Array) -> Any:
        try:
            return upscale(client, window)
        except InferenceServerException as err:
            return err

    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        return list(pool.map(answer, windows))


def run_stages(models: Path, window: Array) -> Array:
    """The same three files without a server."""
    tensors = {spec.LR_WINDOW.name: window}
    for stage in spec.STAGES:
        session = ort.InferenceSession(
            models / stage.name / "1/model.onnx", providers=["CPUExecutionProvider"]
        )
        names = [tensor.name for tensor in stage.outputs]
        feeds = {tensor.name: tensors[tensor.name] for tensor in stage.inputs}
        tensors.update(zip(names, session.run(names, feeds), strict=True))
    return tensors[spec.HR_FRAME.name]


def test_ensemble_answers_like_its_stages(
    client: grpcclient.InferenceServerClient, toy_repository: Path, windows: list[Array]
) -> None:
    hr_frame = upscale(client, windows[0])

    assert hr_frame.dtype == np.uint8
    assert hr_frame.shape == spec.HR_FRAME.shape(1, SIZE)
    np.testing.assert_array_equal(hr_frame, run_stages(toy_repository, windows[0]))


@pytest.mark.parametrize("size", [(16, 64), (64, 16)])
def test_each_axis_scales_alone(client: grpcclient.InferenceServerClient, size: spec.Size) -> None:
    window = np.zeros(spec.LR_WINDOW.shape(1, size), np.uint8)

    assert upscale(client, window).shape == spec.HR_FRAME.shape(1, size)


def test_requests_share_runs_and_answers_stay_the_same(
    client: grpcclient.InferenceServerClient, toy_server: TritonServer, windows: list[Array]
) -> None:
    one_by_one = [upscale(client, window) for window in windows]

    frames_before, runs_before = executions(toy_server, spec.GENERATOR.name)
    together = upscale_all(client, windows)
    frames, runs = executions(toy_server, spec.GENERATOR.name)

    assert frames - frames_before == len(windows)
    assert runs - runs_before < len(windows)
    for alone, shared in zip(one_by_one, together, strict=True):
        np.testing.assert_array_equal(alone, shared)


def test_a_processor_runs_the_samples_of_a_batch_alone(client: grpcclient.InferenceServerClient) -> None:
    def batch_of_my_run(_: int) -> int:
        anything = grpcclient.InferInput("anything", [1, 1], "FP32")
        anything.set_data_from_numpy(np.zeros((1, 1), np.float32))
        return int(client.infer("batch_witness", [anything]).as_numpy("batch").item())

    with ThreadPoolExecutor(spec.MAX_BATCH) as pool:
        assert list(pool.map(batch_of_my_run, range(spec.MAX_BATCH))) == [1] * spec.MAX_BATCH


def test_one_request_may_carry_several_windows(
    client: grpcclient.InferenceServerClient, windows: list[Array]
) -> None:
    joined = upscale(client, np.concatenate(windows[:3]))

    for frame, window in zip(joined, windows, strict=False):
        np.testing.assert_array_equal(frame[None], upscale(client, window))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.zeros((1, *SIZE, 3), np.uint8), "unexpected shape for input 'lr_window'"),
        (np.zeros((1, 5, *SIZE, 3), np.uint8), r"got \[1,5,64,64,3\]"),
        (np.zeros((1, 3, *SIZE, 4), np.uint8), r"got \[1,3,64,64,4\]"),
        (np.zeros((5, 3, *SIZE, 3), np.uint8), "batch-size must be <= 4"),
        (np.zeros((1, 3, *SIZE, 3), np.float32), "data-type is 'FP32'"),
        (np.zeros((1, 3, 66, 64, 3), np.uint8), "INVALID_ARGUMENT.* multiples of 4, found 66x64: pad"),
        (np.zeros((1, 3, 64, 66, 3), np.uint8), "INVALID_ARGUMENT.* multiples of 4, found 64x66: pad"),
    ],
    ids=["rank", "window", "channels", "batch", "dtype", "height", "width"],
)
def test_bad_input_fails_alone(
    client: grpcclient.InferenceServerClient, windows: list[Array], bad: Array, message: str
) -> None:
    good = [upscale(client, window) for window in windows[:4]]

    answers = upscale_all(client, [bad, *windows[:2], bad, bad, *windows[2:4]])

    for index in (0, 3, 4):
        assert isinstance(answers[index], InferenceServerException)
        assert re.search(message, str(answers[index]))
    for expected, answer in zip(good, [*answers[1:3], *answers[5:]], strict=True):
        np.testing.assert_array_equal(expected, answer)
    assert client.is_server_ready() and client.is_model_ready(spec.ENSEMBLE.name)


def test_http_clients_are_told_as_well(toy_server: TritonServer) -> None:
    bad = np.zeros(spec.LR_WINDOW.shape(1, (17, 16)), np.uint8)
    lr_window = httpclient.InferInput(spec.LR_WINDOW.name, list(bad.shape), "UINT8")
    lr_window.set_data_from_numpy(bad)
    with (
        closing(httpclient.InferenceServerClient(toy_server.http_url)) as client,
        pytest.raises(InferenceServerException, match=r"multiples of 4, found 17x16: pad") as refused,
    ):
        client.infer(spec.ENSEMBLE.name, [lr_window])
    assert refused.value.status() == "400"


def test_the_release_is_the_one_that_is_documented(client: grpcclient.InferenceServerClient) -> None:
    assert client.get_server_metadata().version == doctor.EMBEDDED


def test_config_reaches_clients(client: grpcclient.InferenceServerClient) -> None:
    config = client.get_model_config(spec.ENSEMBLE.name).config

    parameters = {name: value.string_value for name, value in config.parameters.items()}
    assert parameters.items() >= spec.PARAMETERS.items()
    assert set(parameters) - set(spec.PARAMETERS) == {
        "precision",
        "version",
        "weights_digest",
        "weights_name",
    }
    assert config.max_batch_size == spec.MAX_BATCH


def test_the_command_as_documented(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`tritonserver --model-repository=model_repository`: loopback only, a clean end, nothing left behind."""
    monkeypatch.chdir(tmp_path)
    build_busy_repository(tmp_path / "model_repository")

    with TritonServer(Path("model_repository"), tmp_path / "triton.log") as server:
        regions = server.shm_regions()
        status = server.stop()

    assert server.command[1] == "--model-repository=model_repository"
    assert status == 0
    started = re.findall(r"Started \w+(?: Service)? at ([\d.]+):", server.log_file.read_text())
    assert started == ["127.0.0.1"] * 3
    assert len(regions) == 1
    assert not server.shm_regions()


def test_a_broken_model_fails_the_start_with_its_name(tmp_path: Path) -> None:
    models = tmp_path / "model_repository"
    build_busy_repository(models)
    onnx_file = models / "busy/1/model.onnx"
    onnx_file.write_bytes(onnx_file.read_bytes()[:1000])

    with (
        pytest.raises(ServerError, match="ended with status 1"),
        TritonServer(models, tmp_path / "triton.log"),
    ):
        pass

    assert re.search(
        r"busy: \S+/busy/1/model.onnx cannot be loaded .*: run `make export` again",
        (tmp_path / "triton.log").read_text(),
    )
