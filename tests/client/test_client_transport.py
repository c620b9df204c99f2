"""The ladder of transports, its CUDA rung against a stand-in for the GPU."""

import os
import sys

import numpy as np
import pytest
from client_fakes import FakeCuda, FakeTriton, decoded, pictures, run_client, write_clip
from tritonclient.utils import InferenceServerException

from mst_gan_client.errors import UpscaleError
from mst_gan_client.serving.server import Server
from mst_gan_client.serving.session import Session
from mst_gan_client.serving.transports import is_on_this_machine
from mst_gan_client.serving.transports.cuda import MODULE

SHAPE = (3, 16, 16, 3)


@pytest.fixture
def cuda(monkeypatch):
    module = FakeCuda()
    monkeypatch.setitem(sys.modules, MODULE, module)
    return module


@pytest.fixture
def triton(cuda):
    with FakeTriton(cuda=cuda) as server:
        yield server


@pytest.fixture
def server(triton):
    opened = Server(triton.url, "mst_gan")
    yield opened
    opened.close()


def values(server, count=40):
    lr_windows = (np.full(SHAPE, t, np.uint8) for t in range(count))
    return [int(hr[0, 0, 0]) for hr in Session([server]).hr_frames(lr_windows)]


def test_frames_pass_through_the_gpu(cuda, triton, server):
    assert server.share_memory(SHAPE) == "CUDA shared memory"
    assert len(triton.cuda_names) == len(cuda.regions) == 2 * server.in_flight
    assert values(server) == list(range(40))
    assert triton.cuda_requests == triton.requests == 40
    server.close()
    assert not triton.cuda_names
    assert not cuda.regions


def test_a_clip_through_the_gpu(cuda, triton, tmp_path, caplog):
    clip = write_clip(tmp_path / "in.mkv", pictures(20), codec="ffv1", pix_fmt="bgr0")
    caplog.set_level("INFO")
    for transport in ("auto", "cuda", "grpc"):
        out = tmp_path / f"{transport}.mkv"
        lossless = ("--codec", "ffv1", "--pix-fmt", "bgr0")
        result = run_client(clip, out, "--url", triton.url, "--transport", transport, *lossless)
        assert result.exit_code == 0, result.output
    assert triton.cuda_requests == 40  # of 60
    assert caplog.text.count("frames pass through CUDA shared memory\n") == 2
    assert not triton.cuda_names and not cuda.regions
    grpc_frames = decoded(tmp_path / "grpc.mkv")
    for transport in ("auto", "cuda"):
        frames = decoded(tmp_path / f"{transport}.mkv")
        assert all((one == other).all() for one, other in zip(frames, grpc_frames, strict=True))


def test_a_failed_run_leaves_nothing_registered(cuda, triton, tmp_path):
    triton.before_answer = lambda count: count == 10 and setattr(cuda, "failing", "get")
    clip = write_clip(tmp_path / "in.mp4", pictures(30))
    result = run_client(clip, tmp_path / "out.mp4", "--url", triton.url)
    assert result.exit_code == 1
    assert "cannot copy from the GPU: no CUDA-capable device" in result.output
    assert not triton.cuda_names and not cuda.regions


def test_a_copy_to_the_gpu_that_fails_is_told(cuda, server):
    server.share_memory(SHAPE)
    cuda.failing = "set"
    with pytest.raises(UpscaleError, match="cannot copy to the GPU: no CUDA-capable device"):
        values(server)


def without_module(cuda, triton, monkeypatch):
    monkeypatch.setitem(sys.modules, MODULE, None)
    return "no CUDA shared memory: cuda-python is not installed"


def without_device(cuda, triton, monkeypatch):
    cuda.failing = "create"
    return "no CUDA shared memory: no CUDA-capable device"


def with_too_little_memory(cuda, triton, monkeypatch):
    cuda.room = 20000
    return "no CUDA shared memory: out of memory"


def with_a_release_that_does_not_fit(cuda, triton, monkeypatch):
    monkeypatch.setattr(FakeCuda, "get_raw_handle", lambda self, handle: handle.reserved)
    return "no CUDA shared memory: 'str' object has no attribute 'reserved'"


def with_a_server_that_refuses(cuda, triton, monkeypatch):
    triton.cuda = None
    message = "failed to register shared memory region: invalid args"
    return f"no CUDA shared memory with {triton.url}: {message}"


def with_a_server_elsewhere(cuda, triton, monkeypatch):
    monkeypatch.setattr("mst_gan_client.serving.transports.is_on_this_machine", lambda address: False)
    return f"no CUDA shared memory: {triton.url} is another machine"


@pytest.mark.parametrize(
    "situation",
    [
        without_module,
        without_device,
        with_too_little_memory,
        with_a_release_that_does_not_fit,
        with_a_server_that_refuses,
        with_a_server_elsewhere,
    ],
)
def test_the_next_rung_is_taken_and_the_reason_told(cuda, triton, server, monkeypatch, situation):
    reason = situation(cuda, triton, monkeypatch)
    # The stand-in for the server has no system shared memory either.
    nor_system = f"no system shared memory with {triton.url}: Method not implemented!"
    assert server.share_memory(SHAPE) == f"gRPC ({reason}; {nor_system})"
    assert not triton.cuda_names and not cuda.regions
    assert values(server) == list(range(40))

    monkeypatch.setattr(
        "mst_gan_client.serving.transports.system.SystemRing.__init__", lambda self, *args: None
    )
    monkeypatch.setattr("mst_gan_client.serving.transports.system.SystemRing.close", lambda self: None)
    assert server.share_memory(SHAPE) == f"system shared memory ({reason})"


def test_a_named_rung_is_tried_alone(cuda, server):
    cuda.failing = "create"
    assert server.share_memory(SHAPE, "cuda") == "gRPC (no CUDA shared memory: no CUDA-capable device)"
    assert server.share_memory(SHAPE, "grpc") == "gRPC (as asked)"


def test_rings_of_killed_clients_are_let_go(triton, server):
    dead, living = "vsr-upscale-999999999-abcd.0.lr", "somebody-else"
    triton.cuda_names.update((dead, living))
    server.share_memory(SHAPE)
    assert dead not in triton.cuda_names and living in triton.cuda_names


def test_rings_that_the_server_still_uses_are_let_go_later(triton, server):
    dead = "vsr-upscale-999999999-abcd.0.lr"
    triton.cuda_names.add(dead)
    triton.names_in_use.add(dead)
    assert server.share_memory(SHAPE) == "CUDA shared memory"
    assert dead in triton.cuda_names
    triton.names_in_use.clear()
    server.close()
    assert not triton.cuda_names


def test_what_killed_clients_left_in_memory_is_removed(server, tmp_path, monkeypatch):
    monkeypatch.setattr("mst_gan_client.serving.transports.system.SHARED_FOLDER", tmp_path)
    dead, fresh = tmp_path / "vsr-upscale-999999999-ab", tmp_path / "vsr-upscale-999999999-cd"
    living, other = tmp_path / f"vsr-upscale-{os.getpid()}-ab", tmp_path / "somebody-else"
    for path in (dead, fresh, living, other):
        path.touch()
        if path is not fresh:
            os.utime(path, (0, 0))
    server.share_memory(SHAPE, "system")
    assert set(tmp_path.iterdir()) == {fresh, living, other}


def test_memory_is_freed_only_when_no_answer_can_come(cuda, triton, server):
    server.share_memory(SHAPE)
    ring = server._ring
    slot = ring.put(np.zeros(SHAPE, np.uint8))
    ring.close()
    assert not triton.cuda_names and cuda.regions
    ring.free(slot)
    assert not cuda.regions


def test_a_restarted_server_is_shared_with_anew(cuda, triton, server):
    server.share_memory(SHAPE)
    triton.stop()
    triton.cuda_names.clear()
    triton.start()
    for _ in range(50):
        try:
            server.check()
            break
        except InferenceServerException:
            continue
    assert len(triton.cuda_names) == len(cuda.regions) == 2 * server.in_flight
    assert values(server) == list(range(40))


@pytest.mark.parametrize(
    ("address", "is_here"),
    [("127.0.0.1:8001", True), ("localhost:8001", True), ("192.0.2.1:8001", False)],
)
def test_which_addresses_are_on_this_machine(address, is_here):
    assert is_on_this_machine(address) == is_here
