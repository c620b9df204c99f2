"""The real weights behind the real server, driven by the real client on a real clip."""

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import tritonclient.grpc as grpcclient
from server_load import IN_FLIGHT, executions

from deploy.demo import bicubic_frame, read_frames, reduce, scores, write_lossless
from deploy.embedded.server import TritonServer
from export import spec
from export.checkpoint import DEFAULT, load_checkpoint
from export.data.sample import sample_clip, sample_windows

pytestmark = [pytest.mark.server, pytest.mark.timeout(600)]

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """What `make export` installed, served."""
    with TritonServer(ROOT / "model_repository", tmp_path_factory.mktemp("server") / "triton.log") as server:
        yield server


@pytest.fixture(scope="module")
def client(server: TritonServer) -> Iterator[grpcclient.InferenceServerClient]:
    with grpcclient.InferenceServerClient(server.grpc_url) as client:
        yield client


def infer(client: grpcclient.InferenceServerClient, lr_window: np.ndarray) -> np.ndarray:
    tensor = grpcclient.InferInput(spec.LR_WINDOW.name, lr_window.shape, spec.LR_WINDOW.dtype)
    tensor.set_data_from_numpy(lr_window)
    return client.infer(spec.ENSEMBLE.name, [tensor]).as_numpy(spec.HR_FRAME.name)


def upscale(folder: Path, server: TritonServer, *options: str) -> None:
    """Run the client on a folder's in.mkv, from within the folder."""
    command = [
        sys.executable,
        ROOT / "client/upscale.py",
        "in.mkv",
        "out.mp4",
        "--url",
        server.grpc_url,
        *options,
    ]
    subprocess.run(list(map(str, command)), cwd=folder, check=True, capture_output=True, text=True)


def test_served_answers_are_the_networks(client: grpcclient.InferenceServerClient) -> None:
    lr_windows = sample_windows(2, (68, 160))
    with torch.inference_mode():
        expected = load_checkpoint(DEFAULT)(torch.from_numpy(lr_windows)).numpy()
    for index in range(2):
        found = infer(client, lr_windows[index : index + 1])[0]
        difference = np.abs(found.astype(int) - expected[index])
        # INT8 rounds differently: a grey level here and there, nowhere a visible one.
        assert difference.max() <= 8
        assert difference.mean() < 0.5


def test_batches_form_and_change_nothing(
    client: grpcclient.InferenceServerClient, server: TritonServer
) -> None:
    lr_windows = np.split(sample_windows(32, (48, 64)), 32)
    alone = [infer(client, lr_window) for lr_window in lr_windows]
    inferences_before, runs_before = executions(server, spec.GENERATOR.name)
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        together = list(pool.map(lambda lr_window: infer(client, lr_window), lr_windows))
    inferences, runs = executions(server, spec.GENERATOR.name)
    assert inferences - inferences_before == len(lr_windows)
    assert (inferences - inferences_before) / (runs - runs_before) > 2
    for one, other in zip(alone, together, strict=True):
        assert np.array_equal(one, other)


def test_client_upscales_a_real_clip_better_than_bicubic(server: TritonServer, tmp_path: Path) -> None:
    truth, rate = read_frames(sample_clip(), 150, 12)
    truth = [frame[:256] for frame in truth]
    lr = [reduce(frame) for frame in truth]
    write_lossless(tmp_path / "in.mkv", lr, rate)
    upscale(tmp_path, server, "--crf", "10")

    ours, served_rate = read_frames(tmp_path / "out.mp4", 0, 100)
    assert len(ours) == len(truth)
    assert served_rate == rate
    psnr, ssim = scores(ours, truth)
    bicubic_psnr, bicubic_ssim = scores([bicubic_frame(frame) for frame in lr], truth)
    assert psnr > bicubic_psnr + 1
    assert ssim > bicubic_ssim + 0.02


def test_odd_size_through_the_real_chain(server: TritonServer, tmp_path: Path) -> None:
    frames, rate = read_frames(sample_clip(), 150, 2)
    write_lossless(tmp_path / "in.mkv", [frame[:61, :119] for frame in frames], rate)
    upscale(tmp_path, server)
    with av.open(str(tmp_path / "out.mp4")) as container:
        decoded = list(container.decode(video=0))
    assert [(frame.height, frame.width) for frame in decoded] == [(244, 476)] * 2
