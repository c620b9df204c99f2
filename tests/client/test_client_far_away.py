"""Servers at the other end of a slow network: delay, loss, TLS, names and addresses of all kinds."""

from __future__ import annotations

import socket
import threading
import time

import numpy as np
import pytest
from client_fakes import LOSSLESS, FakeTriton, decoded, frame_times, nearest, pictures, run_client, write_clip
from delay_proxy import Proxy

from mst_gan_client.errors import ServerError, UpscaleError
from mst_gan_client.serving.addresses import Address, address_from_url, addresses_from_url
from mst_gan_client.serving.opening import open_session

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


@pytest.fixture
def clip(tmp_path):
    return write_clip(tmp_path / "in.mkv", pictures(30), codec="ffv1", pix_fmt="bgr0")


def is_exact(out, clip):
    expected = [nearest(image[None, None].repeat(3, 1))[0] for image in decoded(clip)]
    return frame_times(out) == frame_times(clip) and all(map(np.array_equal, decoded(out), expected))


@pytest.mark.parametrize(("delay_s", "loss"), [(0.1, 0.0), (0.15, 0.01), (0.3, 0.01)])
def test_a_server_far_away(clip, tmp_path, delay_s, loss):
    out = tmp_path / "out.mkv"
    with FakeTriton() as triton, Proxy(triton.port, delay_s, loss) as proxy:
        result = run_client(clip, out, "--url", proxy.url, *LOSSLESS)
    assert result.exit_code == 0, result.output
    assert "lost" not in result.output
    assert is_exact(out, clip)


def test_a_server_far_away_over_tls(clip, tmp_path, certificate):
    key, chain = certificate
    out = tmp_path / "out.mkv"
    with (
        FakeTriton(certificate=(key.read_bytes(), chain.read_bytes())) as triton,
        Proxy(triton.port, 0.3, 0.01) as proxy,
    ):
        url = f"grpcs://localhost:{proxy.port}"
        result = run_client(clip, out, "--url", url, "--tls-ca", chain, *LOSSLESS)
    assert result.exit_code == 0, result.output
    assert is_exact(out, clip)


def behind(monkeypatch, *numbers):
    """Have the resolver know these addresses of gpu.example."""
    known = socket.getaddrinfo

    def look_up(host, port, *arguments, **options):
        if host == "gpu.example":
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (number, port)) for number in numbers]
        return known(host, port, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)


def test_every_address_behind_a_dns_name_is_a_server(clip, tmp_path, monkeypatch):
    behind(monkeypatch, "127.0.0.1", "127.0.0.2", "127.0.0.1")
    out = tmp_path / "out.mkv"
    with (
        FakeTriton(before_answer=lambda _: time.sleep(0.01)) as one,
        FakeTriton(host="127.0.0.2", port=one.port, before_answer=lambda _: time.sleep(0.01)) as two,
    ):
        result = run_client(clip, out, "--url", f"dns:///gpu.example:{one.port}", *LOSSLESS)
        assert result.exit_code == 0, result.output
        assert is_exact(out, clip)
        assert one.requests > 0 and two.requests > 0


def test_one_of_the_addresses_behind_a_name_is_down(clip, tmp_path, monkeypatch, caplog):
    behind(monkeypatch, "127.0.0.3", "127.0.0.1")
    out = tmp_path / "out.mkv"
    with FakeTriton() as triton:
        result = run_client(clip, out, "--url", f"dns:///gpu.example:{triton.port}", *LOSSLESS)
        assert result.exit_code == 0, result.output
        assert is_exact(out, clip)
        assert f"no Triton server answers at 127.0.0.3:{triton.port}" in caplog.text
        assert "going on without it until it answers" in caplog.text


def test_tls_knows_a_server_behind_a_name_by_the_name(monkeypatch):
    behind(monkeypatch, "127.0.0.1")
    assert addresses_from_url("grpcs+dns:///gpu.example:9000") == [
        Address("127.0.0.1:9000", True, "gpu.example")
    ]
    assert addresses_from_url("gpu.example") == [Address("gpu.example:8001", False)]


def test_a_certificate_is_checked_against_the_name(certificate):
    key, chain = certificate
    with FakeTriton(certificate=(key.read_bytes(), chain.read_bytes())) as triton:
        from mst_gan_client.serving.security import Security
        from mst_gan_client.serving.server import Server

        security = Security(ca=chain)
        for name, is_trusted in (("localhost", True), ("gpu.example", False)):
            address = Address(triton.url, True, name)
            if is_trusted:
                Server(address, "mst_gan", security).close()
            else:
                with pytest.raises(ServerError, match="no Triton server answers"):
                    Server(address, "mst_gan", security)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("dns://8.8.8.8/gpu.example:8001", "write dns:///gpu.example:8001"),
        ("dns:///", "expected HOST:PORT, found 'dns:///'"),
        ("unix:///run/triton", "does not speak unix"),
        ("dns:///no.such.name.invalid:8001", "no address is known for no.such.name.invalid"),
    ],
)
def test_wrong_names(url, message):
    with pytest.raises(UpscaleError, match=message):
        addresses_from_url(url)


def test_ipv6_without_brackets():
    assert address_from_url("::1") == ("[::1]:8001", False)
    assert address_from_url("grpcs://fe80::1%eth0") == ("[fe80::1%eth0]:8001", True)


def has_ipv6():
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


def test_ipv6(clip, tmp_path):
    out = tmp_path / "out.mkv"
    if not has_ipv6():  # the address is understood nevertheless
        result = run_client(clip, out, "--url", "[::1]:9")
        assert "no Triton server answers at [::1]:9" in result.output
        return
    with FakeTriton(host="[::1]") as triton:
        result = run_client(clip, out, "--url", f"[::1]:{triton.port}", *LOSSLESS)
    assert result.exit_code == 0, result.output
    assert is_exact(out, clip)


@pytest.mark.parametrize(
    ("first", "second", "line"),
    [
        ("127.0.0.1", "127.0.0.1", "127.0.0.1:{port} is named twice: it is used once"),
        ("127.0.0.1", "localhost", "127.0.0.1:{port} and localhost:{port} are one server: it is used once"),
        ("localhost", "127.0.0.1", "localhost:{port} and 127.0.0.1:{port} are one server: it is used once"),
    ],
)
def test_a_server_that_is_named_twice(caplog, first, second, line):
    with FakeTriton() as triton:
        urls = [f"{host}:{triton.port}" for host in (first, second)]
        with open_session(urls) as session:
            assert session.in_flight == 16
    assert caplog.text.count("it is used once") == 1
    assert line.format(port=triton.port) in caplog.text


def test_a_server_that_is_named_twice_while_it_works_for_others(caplog):
    """Its counters move between two looks at it."""
    with FakeTriton() as triton:
        counted = triton.ModelStatistics
        looks = []

        def busy(request, context):
            looks.append(1)
            if len(looks) == 1:
                triton.requests += 1
            return counted(request, context)

        triton.stop()
        triton.ModelStatistics = busy
        triton.start()
        with open_session([f"{host}:{triton.port}" for host in ("127.0.0.1", "localhost")]) as session:
            assert session.in_flight == 16


def test_two_servers_alike_are_two(caplog):
    with FakeTriton() as one, FakeTriton() as two, open_session([one.url, two.url]) as session:
        assert session.in_flight == 32
    assert "it is used once" not in caplog.text


def test_a_server_that_is_down_at_the_start_joins(caplog):
    """Whatever it has to tell: no answer, or that its models are not loaded yet."""
    late, loading = FakeTriton(), FakeTriton()
    late.stop()
    model, loading.config.name = loading.config.name, "other"
    with FakeTriton(before_answer=lambda _: time.sleep(0.02)) as one, loading, late:

        def windows():
            for t in range(400):
                if t == 20:
                    late.start()
                    loading.config.name = model
                yield np.full((3, 16, 16, 3), t % 256, np.uint8)

        with open_session([late.url, one.url, loading.url]) as session:
            assert session.in_flight == 16
            answers = [int(hr[0, 0, 0]) for hr in session.hr_frames(windows())]
            assert session.in_flight == 48
        assert answers == [t % 256 for t in range(400)]
        assert late.requests and loading.requests
    assert f"{late.url} is there now" in caplog.text


def test_a_server_that_joins_with_other_weights_is_left_out(caplog):
    late = FakeTriton(network=lambda windows: ~nearest(windows))
    late.stop()
    left_out = threading.Event()
    with FakeTriton() as one, late:

        def windows():
            for t in range(40):
                if t == 20:
                    late.start()
                    while "is left out" not in caplog.text:
                        time.sleep(0.01)
                    left_out.set()
                yield np.full((3, 16, 16, 3), t, np.uint8)

        with open_session([one.url, late.url]) as session:
            assert [int(hr[0, 0, 0]) for hr in session.hr_frames(windows())] == list(range(40))
        assert left_out.is_set() and not late.requests


def test_all_servers_down_are_all_named():
    with pytest.raises(ServerError) as raised, open_session(["127.0.0.1:9", "127.0.0.1:11"]):
        pass
    assert "no Triton server answers at 127.0.0.1:9" in str(raised.value)
    assert "no Triton server answers at 127.0.0.1:11" in str(raised.value)


def test_twelve_servers_one_late_and_two_that_die_and_come_back(clip, tmp_path):
    """The order is kept, nothing is there twice, and the output is that of one server."""
    frames = write_clip(tmp_path / "long.mkv", pictures(300), codec="ffv1", pix_fmt="bgr0")
    out = tmp_path / "out.mkv"
    tritons = [FakeTriton(before_answer=lambda _: time.sleep(0.03)) for _ in range(12)]
    late, *dying = tritons[3], tritons[7], tritons[11]
    late.stop()
    started, late_is_asked = threading.Event(), threading.Event()

    def answer_slowly(count):
        if all(triton.requests for triton in tritons if triton is not late):
            started.set()
        if count > 3:  # the clip must not be done before the late server has had its share
            late_is_asked.wait(30)
        time.sleep(0.03)

    def come_and_go():
        started.wait(60)
        late.start()
        for triton in dying:
            triton.stop()
        time.sleep(0.5)
        for triton in dying:
            triton.start()

    thread = threading.Thread(target=come_and_go)
    thread.start()
    for triton in tritons:
        triton.before_answer = answer_slowly
    late.before_answer = lambda _: late_is_asked.set()
    try:
        urls = ",".join(triton.url for triton in tritons)
        result = run_client(frames, out, "--url", urls, *LOSSLESS)
    finally:
        started.set()
        thread.join()
        for triton in tritons:
            triton.stop()
    assert result.exit_code == 0, result.output
    assert is_exact(out, frames)
    assert all(triton.requests > 0 for triton in tritons)
