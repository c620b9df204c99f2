"""``deploy/nginx``: TLS, tokens, limits and two servers behind a real nginx."""

from __future__ import annotations

import re
import shutil
import socket
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
import pytest
import yaml
from client_fakes import LOSSLESS, FakeTriton, decoded, nearest, pictures, run_client, write_clip
from requirements import missing
from server_load import executions
from tritonclient.grpc import service_pb2, service_pb2_grpc

from deploy import doctor
from deploy.embedded.server import TritonServer, free_ports

CONFIGURATION = Path(doctor.__file__).with_name("nginx") / "nginx.conf"
TOKEN = "a-token-of-the-tests"
PATIENCE_S = 60


def make_certificate(folder: Path, until: str, since: str = "20200101") -> None:
    """A certificate for localhost that vouches for itself, between two dates as YYYYMMDD."""
    if not shutil.which("openssl"):
        missing("ALL", "no openssl found: apt-get install openssl")
    key, request, ca = folder / "key.pem", folder / "request.pem", folder / "ca"
    ca.mkdir()  # `openssl req` before 3.4 takes no dates, `openssl ca` does
    (ca / "index").touch()
    (ca / "ca.conf").write_text(
        "[ca]\ndefault_ca = own\n[own]\n"
        f"database = {ca}/index\nnew_certs_dir = {ca}\nrand_serial = yes\n"
        "default_md = sha256\npolicy = any\ncopy_extensions = copy\n[any]\ncommonName = supplied\n"
    )
    command = [
        "openssl", "req", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost",
        "-addext", "subjectAltName=DNS:localhost", "-addext", "basicConstraints=CA:TRUE",
        "-keyout", str(key), "-out", str(request),
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    command = [
        "openssl", "ca", "-batch", "-selfsign", "-notext", "-config", str(ca / "ca.conf"),
        "-keyfile", str(key), "-in", str(request), "-out", str(folder / "certificate.pem"),
        "-startdate", f"{since}000000Z", "-enddate", f"{until}000000Z",
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)


@dataclass
class Proxy:
    """A running nginx."""

    port: int
    status_port: int
    certificate: Path

    @contextmanager
    def stub(self, token: str | None = TOKEN) -> Iterator[service_pb2_grpc.GRPCInferenceServiceStub]:
        """Triton's service, asked with this token."""
        credentials = grpc.ssl_channel_credentials(self.certificate.read_bytes())
        if token:
            credentials = grpc.composite_channel_credentials(
                credentials, grpc.access_token_call_credentials(token)
            )
        with grpc.secure_channel(f"localhost:{self.port}", credentials) as channel:
            yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


@contextmanager
def nginx(
    folder: Path,
    addresses: list[str],
    *,
    since: str = "20200101",
    until: str = "20490101",
    **changes: str,
) -> Iterator[Proxy]:
    """The committed configuration on free ports, with texts replaced."""
    program = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin")
    if not program:
        missing("ALL", "no nginx found: apt-get install nginx-light")
    port, status_port = free_ports(2)
    text = CONFIGURATION.read_text()
    for old, new in {"8443": str(port), "8444": str(status_port), **changes}.items():
        assert old in text
        text = text.replace(old, new)
    (folder / "nginx.conf").write_text(text)
    (folder / "servers.conf").write_text(
        "".join(f"server {address} max_fails=1 fail_timeout=5s;\n" for address in addresses)
    )
    (folder / "tokens.map").write_text(f'"Bearer {TOKEN}" 1;\n')
    make_certificate(folder, until, since)
    command = [program, "-p", str(folder), "-c", str(folder / "nginx.conf"), "-g", "user root;"]
    with (folder / "log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            deadline = time.monotonic() + PATIENCE_S
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
                except OSError:
                    assert process.poll() is None, (folder / "log").read_text()
                    assert time.monotonic() < deadline
                    time.sleep(0.05)
            yield Proxy(port, status_port, folder / "certificate.pem")
        finally:
            process.terminate()


def infer(size: int = 16) -> service_pb2.ModelInferRequest:
    """A request for one square frame."""
    window = np.zeros((1, 3, size, size, 3), np.uint8)
    request = service_pb2.ModelInferRequest(model_name="mst_gan", raw_input_contents=[window.tobytes()])
    request.inputs.add(name="lr_window", datatype="UINT8", shape=window.shape)
    return request


def upscale(clip: Path, out: Path, proxy: Proxy, token: str = TOKEN):
    url = f"grpcs://localhost:{proxy.port}"
    tls = ("--tls-ca", str(proxy.certificate), "--token", token)
    return run_client(str(clip), str(out), "--url", url, *tls, *LOSSLESS)


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return write_clip(tmp_path / "in.mkv", pictures(24), codec="ffv1", pix_fmt="bgr0")


def test_a_server_killed_in_the_middle_of_a_film_costs_no_frame(clip: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.mkv"
    with FakeTriton() as first, FakeTriton() as second, nginx(tmp_path, [first.url, second.url]) as proxy:
        killed = []

        def kill(count: int) -> None:
            if count == 4:
                killed.append(count)
                first._server.stop(grace=0)

        first.before_answer = kill
        result = upscale(clip, out, proxy)
        assert result.exit_code == 0, result.output
        assert killed and second.requests
        sent = first.headers + second.headers
    assert all(headers["authorization"] == f"Bearer {TOKEN}" for headers in sent)
    frames = decoded(out)
    assert len(frames) == 24
    for found, image in zip(frames, decoded(clip), strict=True):
        assert np.array_equal(found, nearest(np.stack([image] * 3)[None])[0])


@pytest.mark.slow
@pytest.mark.server
def test_a_real_server_killed_in_the_middle_of_a_film_costs_no_frame(
    toy_repository: Path, tmp_path: Path
) -> None:
    clip = write_clip(tmp_path / "in.mkv", pictures(120), codec="ffv1", pix_fmt="bgr0")
    proxied, alone = tmp_path / "out.mkv", tmp_path / "alone.mkv"
    with (
        TritonServer(toy_repository, tmp_path / "first.log") as first,
        TritonServer(toy_repository, tmp_path / "second.log") as second,
        nginx(tmp_path, [first.grpc_url, second.grpc_url]) as proxy,
        ThreadPoolExecutor(1) as pool,
    ):
        film = pool.submit(upscale, clip, proxied, proxy)
        deadline = time.monotonic() + PATIENCE_S
        while executions(second, "mst_gan")[0] < 10:
            assert not film.done() and time.monotonic() < deadline
        second.process.kill()
        result = film.result(PATIENCE_S)
        assert result.exit_code == 0, result.output
        by_first, _ = executions(first, "mst_gan")
        assert 10 < by_first < 120  # and the rest by the second
        result = run_client(str(clip), str(alone), "--url", first.grpc_url, *LOSSLESS)
        assert result.exit_code == 0, result.output
    frames = decoded(proxied)
    assert len(frames) == 120
    for found, expected in zip(frames, decoded(alone), strict=True):
        assert np.array_equal(found, expected)


def test_a_wrong_token_is_refused(clip: Path, tmp_path: Path) -> None:
    with FakeTriton() as triton, nginx(tmp_path, [triton.url]) as proxy:
        result = upscale(clip, tmp_path / "out.mkv", proxy, token="wrong")
        for token in (None, "wrong"):
            with proxy.stub(token) as stub, pytest.raises(grpc.RpcError) as refused:
                stub.ModelInfer(infer(), timeout=PATIENCE_S)
            assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert result.exit_code == 1 and not (tmp_path / "out.mkv").exists()
    assert triton.requests + triton.probes == 0


def test_an_expired_certificate_is_refused(clip: Path, tmp_path: Path) -> None:
    with FakeTriton() as triton, nginx(tmp_path, [triton.url], until="20200201") as proxy:
        result = run_client(
            str(clip), str(tmp_path / "out.mkv"), "--url", f"grpcs://localhost:{proxy.port}",
            "--tls-ca", str(proxy.certificate), "--token", TOKEN, "--patience", "1",
        )  # fmt: skip
    assert result.exit_code == 1 and not (tmp_path / "out.mkv").exists()
    assert triton.requests + triton.probes == 0


def test_large_messages_and_too_many_are_refused(tmp_path: Path) -> None:
    limits = {"client_max_body_size 64m": "client_max_body_size 8m", "500r/s": "1r/m", "burst=500": "burst=2"}
    with (
        FakeTriton() as triton,
        nginx(tmp_path, [triton.url], **limits) as proxy,
        proxy.stub() as stub,
    ):
        with pytest.raises(grpc.RpcError, match="413"):
            stub.ModelInfer(infer(1200), timeout=PATIENCE_S)
        assert triton.requests == 0
        stub.ModelInfer(infer(), timeout=PATIENCE_S)
        with pytest.raises(grpc.RpcError, match="429"):
            for _ in range(4):
                stub.ModelInfer(infer(), timeout=PATIENCE_S)


def test_what_changes_a_server_is_refused_and_the_status_is_on_loopback_alone(tmp_path: Path) -> None:
    with FakeTriton() as triton, nginx(tmp_path, [triton.url]) as proxy:
        with proxy.stub() as stub:
            for call, request in (
                (stub.RepositoryIndex, service_pb2.RepositoryIndexRequest()),
                (stub.SystemSharedMemoryStatus, service_pb2.SystemSharedMemoryStatusRequest()),
            ):
                with pytest.raises(grpc.RpcError) as refused:
                    call(request, timeout=PATIENCE_S)
                assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
        local = f"http://127.0.0.1:{proxy.status_port}/status"
        with urllib.request.urlopen(local, timeout=PATIENCE_S) as answer:
            assert answer.read().startswith(b"Active connections")
        context = ssl.create_default_context(cafile=str(proxy.certificate))
        public = urllib.request.Request(
            f"https://localhost:{proxy.port}/status", headers={"Authorization": f"Bearer {TOKEN}"}
        )
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(public, timeout=PATIENCE_S, context=context)
    assert "listen 127.0.0.1:8444" in CONFIGURATION.read_text()


def test_envoys_example_lets_the_same_through() -> None:
    envoy = (CONFIGURATION.parents[1] / "envoy" / "envoy.yaml").read_text()
    found = yaml.safe_load(envoy)
    assert found["admin"]["address"]["socket_address"]["address"] == "127.0.0.1"
    (listener,) = found["static_resources"]["listeners"]
    (chain,) = listener["filter_chains"]
    assert chain["transport_socket"]["name"] == "envoy.transport_sockets.tls"
    (manager,) = chain["filters"]
    names = [one["name"].rpartition(".")[2] for one in manager["typed_config"]["http_filters"]]
    assert names == ["rbac", "local_ratelimit", "buffer", "router"]  # the token first
    methods = [
        set(re.search(r"GRPCInferenceService/\(([\w|]+)\)", text)[1].split("|"))
        for text in (envoy, CONFIGURATION.read_text())
    ]
    assert methods[1] - methods[0] == {"ModelStreamInfer"} and methods[0] < methods[1]
    assert "client_max_body_size 64m" in CONFIGURATION.read_text()
    assert manager["typed_config"]["http_filters"][2]["typed_config"]["max_request_bytes"] == 64 << 20
