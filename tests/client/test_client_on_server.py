"""The client against the real embedded Triton server, with small models and once with the real ones."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
import onnx
import pytest
import tritonclient.grpc as grpcclient
from client_fakes import decoded, frame_times, packets, pictures, run_client, write_clip
from tritonclient.utils import InferenceServerException

from deploy.embedded.server import TritonServer
from mst_gan_client.serving.server import Server
from mst_gan_client.serving.session import Session

pytestmark = [pytest.mark.server, pytest.mark.timeout(180)]

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "client" / "upscale.py"
LOSSLESS = ("--codec", "ffv1", "--pix-fmt", "bgr0", "--segment-frames", 10)


def lossless_clip(path: Path, count: int, height: int, width: int) -> Path:
    return write_clip(path, pictures(count, height, width), codec="ffv1", pix_fmt="bgr0", audio=True)


@pytest.mark.parametrize("transport", ["auto", "grpc"])
def test_a_clip_goes_through_the_ensemble(toy_server, tmp_path, transport, caplog):
    """Every frame is bit for bit what the ensemble answers to its window, asked for alone."""
    clip = lossless_clip(tmp_path / "in.mkv", 24, 34, 50)
    out = tmp_path / "out.mkv"
    caplog.set_level("INFO")
    result = run_client(clip, out, "--url", toy_server.grpc_url, "--transport", transport, *LOSSLESS)
    assert result.exit_code == 0, result.output
    taken = {"auto": "frames pass through system shared memory", "grpc": "through gRPC (as asked)"}
    assert taken[transport] in caplog.text
    assert shared_memory(toy_server) == []
    assert frame_times(out) == frame_times(clip)
    assert packets(out, "audio") == packets(clip, "audio")

    lr = [np.pad(image, ((0, 2), (0, 2), (0, 0)), mode="edge") for image in decoded(clip)]
    hr = decoded(out)
    with grpcclient.InferenceServerClient(toy_server.grpc_url) as client:
        for t in range(24):
            window = np.stack([lr[max(t - 1, 0)], lr[t], lr[min(t + 1, 23)]])[None]
            request = grpcclient.InferInput("lr_window", window.shape, "UINT8")
            request.set_data_from_numpy(window)
            expected = client.infer("mst_gan", [request]).as_numpy("hr_frame")[0, : 34 * 4, : 50 * 4]
            assert (hr[t] == expected).all()


def test_http_port_of_the_server(toy_server, tmp_path):
    clip = write_clip(tmp_path / "in.mp4", pictures(2))
    result = run_client(clip, tmp_path / "out.mp4", "--url", toy_server.http_url)
    assert result.exit_code == 1
    assert "found HTTP: give Triton's gRPC port" in result.output


def shared_memory(server, process=None):
    """Names of the regions that clients have registered, and of those of a process that lie about here."""
    with grpcclient.InferenceServerClient(server.grpc_url) as client:
        registered = client.get_system_shared_memory_status().regions
    lying_about = Path("/dev/shm").glob(f"vsr-upscale-*-{process or os.getpid()}-*")
    return [*registered, *(path.name for path in lying_about)]


def test_shared_memory_of_a_killed_client_is_let_go(toy_server, tmp_path):
    clip = lossless_clip(tmp_path / "in.mkv", 180, 64, 64)
    command = [sys.executable, SCRIPT, clip, tmp_path / "out.mkv", "--url", toy_server.grpc_url, *LOSSLESS]
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.DEVNULL)
    while not (tmp_path / "out.mkv.part" / "000000.segment").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert len(shared_memory(toy_server, process.pid)) == 1  # the server's note of it; the name is gone
    result = run_client(clip, tmp_path / "out.mkv", "--url", toy_server.grpc_url, *LOSSLESS)
    assert result.exit_code == 0, result.output
    assert shared_memory(toy_server) == []


def test_shared_memory_of_an_abandoned_clip_is_let_go(toy_server):
    """Stopped in mid-flight; another clip of another size follows on the same connection."""
    with closing(Server(toy_server.grpc_url, "mst_gan")) as server:
        session = Session([server])
        for size in (128, 64):
            lr_window = np.stack(pictures(3, size, size))
            assert session.share_memory(lr_window.shape).startswith("system shared memory")
            frames = session.hr_frames(lr_window for _ in range(100))
            next(frames)
            frames.close()
    assert shared_memory(toy_server) == []


def test_a_window_sent_to_a_server_that_has_unloaded_its_models(toy_repository, tmp_path):
    """Triton answers so for seconds before it closes its port; the window waits for the next server."""
    triton = TritonServer(toy_repository, tmp_path / "triton.log")
    lr_window = np.stack(pictures(3, 32, 32))

    def come_back():
        triton.process.wait()
        triton.__enter__()

    def lr_windows(pool, back):
        yield lr_window
        triton.process.terminate()
        with grpcclient.InferenceServerClient(triton.grpc_url) as client:
            while True:
                try:
                    client.get_model_config("mst_gan")
                except InferenceServerException as err:
                    assert "has no available versions" in err.message()
                    break
                time.sleep(0.01)
        back.append(pool.submit(come_back))
        yield lr_window

    with triton, ThreadPoolExecutor(1) as pool, closing(Server(triton.grpc_url, "mst_gan")) as server:
        back = []
        session = Session([server])
        before, after = session.hr_frames(lr_windows(pool, back))
        back[0].result()
    assert (before == after).all()
    assert session.resent > 0


def test_a_run_goes_on_with_the_same_weights_only(toy_repository, tmp_path):
    clip = lossless_clip(tmp_path / "in.mkv", 120, 64, 64)
    out = tmp_path / "out.mkv"
    others = shutil.copytree(toy_repository, tmp_path / "others")
    generator = onnx.load(others / "generator" / "1" / "model.onnx")
    weight = next(one for one in generator.graph.initializer if one.name == "weight_0")
    reordered = onnx.numpy_helper.to_array(weight)[::-1].copy()
    weight.CopyFrom(onnx.numpy_helper.from_array(reordered, weight.name))
    onnx.save(generator, others / "generator" / "1" / "model.onnx")

    with TritonServer(toy_repository, tmp_path / "first.log") as server:
        command = [sys.executable, SCRIPT, clip, out, "--url", server.grpc_url, *LOSSLESS]
        process = subprocess.Popen(list(map(str, command)), stderr=subprocess.DEVNULL)
        while not (tmp_path / "out.mkv.part" / "000000.segment").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
        process.wait()
    with TritonServer(others, tmp_path / "others.log") as server:
        result = run_client(clip, out, "--url", server.grpc_url, *LOSSLESS)
        assert result.exit_code == 1
        assert "holds an unfinished run with other weights: expected " in result.output
    with TritonServer(toy_repository, tmp_path / "again.log") as server:
        result = run_client(clip, out, "--url", server.grpc_url, *LOSSLESS)
        assert result.exit_code == 0, result.output
        assert run_client(clip, tmp_path / "calm.mkv", "--url", server.grpc_url, *LOSSLESS).exit_code == 0
    calm = decoded(tmp_path / "calm.mkv")
    assert all((one == other).all() for one, other in zip(decoded(out), calm, strict=True))


@pytest.mark.parametrize(("models", "death"), [("small", "kill"), ("small", "terminate"), ("real", "kill")])
def test_a_server_that_dies_and_comes_back(toy_repository, tmp_path, models, death):
    """The client waits, sends again what was lost, and the result is that of a run without trouble."""
    repository = {"small": toy_repository, "real": ROOT / "model_repository"}[models]
    clip = lossless_clip(tmp_path / "in.mkv", 64, 64, 64)
    out = tmp_path / "out.mkv"
    server = TritonServer(repository, tmp_path / "triton.log")
    with ThreadPoolExecutor(1) as pool, server:
        assert run_client(clip, tmp_path / "calm.mkv", "--url", server.grpc_url, *LOSSLESS).exit_code == 0
        run = pool.submit(run_client, clip, out, "--url", server.grpc_url, *LOSSLESS)
        while not (tmp_path / "out.mkv.part" / "000001.segment").exists():
            assert not run.done(), run.result().output
            time.sleep(0.01)
        getattr(server.process, death)()
        server.process.wait()
        # ServerProtocol to end, Triton may well answer all that is left first; killed, it cannot.
        assert death == "terminate" or not run.done()
        with server:
            result = run.result()
    assert result.exit_code == 0, result.output
    assert frame_times(out) == frame_times(clip)
    calm = decoded(tmp_path / "calm.mkv")
    assert all((one == other).all() for one, other in zip(decoded(out), calm, strict=True))


def test_the_logs_of_client_and_server_join_on_the_request_id(tmp_path, toy_server, caplog):
    caplog.set_level("INFO")
    clip = write_clip(tmp_path / "in.mp4", pictures(3, 16, 32))
    with grpcclient.InferenceServerClient(toy_server.grpc_url) as client:
        client.update_log_settings({"log_verbose_level": 1})  # as --log-verbose=1 does
        begin = toy_server.log_file.stat().st_size
        try:
            assert run_client(clip, tmp_path / "out.mp4", "--url", toy_server.grpc_url).exit_code == 0
        finally:
            client.update_log_settings({"log_verbose_level": 0})
    (run,) = re.findall(r"requests are named ([0-9a-f]{8})-FRAME-TILE", caplog.text)
    models = ("mst_gan", "flow_align", "generator", "pixel_shuffle")
    expected = {(f"{run}-{frame}-0", model, "2") for frame in (1, 2, 3) for model in models}
    deadline = time.monotonic() + 30  # the server's log may be late
    while True:
        log = toy_server.log_file.read_text(errors="replace")[begin:]
        found = set(re.findall(rf"request id: ({run}\S+), model: (\w+),.* priority: (\d+)", log))
        if found == expected:
            break
        assert time.monotonic() < deadline, found
        time.sleep(0.1)
