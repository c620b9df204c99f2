"""Transports: shared memory and gRPC; CUDA against a stand-in for the GPU."""

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from client_fakes import FakeCuda, FakeTriton, decoded, pictures, run_client, write_clip
from tritonclient.utils import InferenceServerException

from mst_gan_client.errors import UpscaleError
from mst_gan_client.serving.server import Server
from mst_gan_client.serving.session import Session
from mst_gan_client.serving.transports import is_on_this_machine, ring
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
    assert triton.cuda_requests == triton.requests >= 40
    server.close()
    assert not triton.cuda_names
    assert not cuda.regions


def test_a_clip_through_the_gpu(cuda, triton, tmp_path, caplog):
    clip = write_clip(tmp_path / "in.mkv", pictures(20), codec="ffv1", pix_fmt="bgr0")
    caplog.set_level("INFO")
    for transport in ("auto", "cuda", "grpc"):
        out, before = tmp_path / f"{transport}.mkv", triton.cuda_requests
        lossless = ("--codec", "ffv1", "--pix-fmt", "bgr0")
        result = run_client(clip, out, "--url", triton.url, "--transport", transport, *lossless)
        assert result.exit_code == 0, result.output
        assert (triton.cuda_requests == before) == (transport == "grpc")
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
    monkeypatch.setattr("mst_gan_client.serving.transports.system.SystemRing.close", lambda *args: False)
    assert server.share_memory(SHAPE) == f"system shared memory ({reason})"


def test_a_named_rung_is_tried_alone(cuda, server):
    cuda.failing = "create"
    assert server.share_memory(SHAPE, "cuda") == "gRPC (no CUDA shared memory: no CUDA-capable device)"
    assert server.share_memory(SHAPE, "grpc") == "gRPC (as asked)"


def dead_process():
    with subprocess.Popen(["true"]) as process:
        return process.pid


def name_of(process, namespace=None):
    return f"vsr-upscale-{namespace or ring.pid_namespace()}-{process}-abcd"


def names_of_others():
    """Whose owners are alive, or cannot be proved dead."""
    here, dead = ring.pid_namespace(), dead_process()
    return {
        "somebody-else",
        name_of(os.getpid()),
        name_of(1),  # of another user, unless this is root
        name_of(dead, f"{here[:-1]}{'0' if here[-1] != '0' else '1'}"),  # another container, or machine
        f"vsr-upscale-{dead}-abcd",
        f"vsr-upscale-{here}-{dead}x-abcd",
        f"other-vsr-upscale-{here}-{dead}-abcd",
    }


def test_only_rings_of_dead_clients_are_let_go(triton, server):
    others = names_of_others()
    dead = f"{name_of(dead_process())}.0.lr"
    triton.cuda_names.update((dead, *others))
    server.share_memory(SHAPE)
    server.close()
    assert triton.cuda_names == others


def test_rings_that_the_server_still_uses_are_let_go_later(triton, server):
    dead = f"{name_of(dead_process())}.0.lr"
    triton.cuda_names.add(dead)
    triton.names_in_use.add(dead)
    assert server.share_memory(SHAPE) == "CUDA shared memory"
    assert dead in triton.cuda_names
    triton.names_in_use.clear()
    server.close()
    assert not triton.cuda_names


def test_only_what_dead_clients_left_in_memory_is_removed(server, tmp_path, monkeypatch):
    monkeypatch.setattr("mst_gan_client.serving.transports.system.SHARED_FOLDER", tmp_path)
    others = {tmp_path / name for name in names_of_others()}
    for path in (tmp_path / name_of(dead_process()), *others):
        path.touch()
    server.share_memory(SHAPE, "system")
    assert set(tmp_path.iterdir()) == others


IN_A_CONTAINER = """
import sys, os
from mst_gan_client.serving.transports import ring
print(ring.NAME_PREFIX + f"-{ring.pid_namespace()}-{os.getpid()}-abcd", flush=True)
print([name for name in sys.stdin.readline().split() if ring.is_dead(name)], flush=True)
sys.stdin.readline()
"""


@pytest.mark.skipif(
    subprocess.run(
        ["unshare", "--pid", "--fork", "--mount-proc", "true"], stderr=subprocess.DEVNULL
    ).returncode != 0,
    reason="needs the right to make a pid namespace (root)",
)  # fmt: skip
def test_to_another_pid_namespace_nobody_here_is_dead():
    with subprocess.Popen(
        ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", IN_A_CONTAINER],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as container:  # fmt: skip
        theirs = container.stdout.readline().strip()
        container.stdin.write(f"{name_of(os.getpid())} {name_of(dead_process())} {theirs}\n")
        container.stdin.flush()
        assert container.stdout.readline() == "[]\n"
        assert "-1-abcd" in theirs
        assert not ring.is_dead(theirs)
        container.stdin.close()
    assert not ring.is_dead(theirs)  # it is, but who could tell?


@pytest.fixture
def held(triton):
    """The requests that the server works on until they are let go; its regions are in use so long."""
    release = threading.Event()
    triton.before_answer = lambda count: release.wait(30)
    yield release
    release.set()


def abandon(server, triton):
    """Ask for a clip, and stop before the first frame is there."""
    server.share_memory(SHAPE)
    session = Session([server])
    with ThreadPoolExecutor(1) as pool:
        lr_windows = (np.full(SHAPE, t, np.uint8) for t in range(40))
        frames = pool.submit(list, session.hr_frames(lr_windows))
        while triton.under_way < server.in_flight:
            time.sleep(0.01)
        session.stop()
        assert frames.result() == []


def test_an_abandoned_clips_memory_is_let_go_when_its_requests_end(cuda, triton, server, held):
    abandon(server, triton)
    closing = threading.Thread(target=server.close)
    closing.start()
    while not triton.refused_unregister:
        time.sleep(0.01)
    assert len(cuda.regions) == 2 * server.in_flight
    held.set()
    closing.join()
    assert not triton.cuda_names and not cuda.regions


def test_one_region_in_use_keeps_no_other(cuda, triton, server, held, monkeypatch, caplog):
    """What the server does not let go of is said, kept, and asked for again with the next ring."""
    monkeypatch.setattr("mst_gan_client.serving.server.RELEASE_TIMEOUT_S", 0.2)
    abandon(server, triton)
    stuck = min(triton.cuda_names)
    triton.names_in_use.add(stuck)
    held.set()

    server.share_memory(SHAPE, "grpc")
    assert triton.cuda_names == set(cuda.regions) == {stuck}
    assert "of shared memory for requests that were given up" in caplog.text

    triton.names_in_use.clear()
    server.share_memory(SHAPE, "grpc")
    assert not triton.cuda_names and not cuda.regions


def test_memory_stays_while_a_server_that_gives_no_answer_may_write_to_it(cuda, triton, server):
    server.share_memory(SHAPE)
    triton.stop()
    server.close()
    assert len(cuda.regions) == 2 * server.in_flight


def test_memory_is_freed_only_when_no_answer_can_come(cuda, triton, server):
    server.share_memory(SHAPE)
    slot = server._ring.put(np.zeros(SHAPE, np.uint8))
    server._ring.close(timeout_s=0)
    assert not triton.cuda_names and cuda.regions
    server._ring.free(slot)
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
