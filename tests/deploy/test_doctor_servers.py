"""``make doctor --url``: what it finds at running servers, each with a real or made-up cause."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest
from click.testing import CliRunner
from client_fakes import FakeTriton, ensemble_config, http_server, stage_config
from test_nginx import TOKEN, Proxy, nginx
from tritonclient.grpc import InferenceServerClient, service_pb2
from tritonclient.utils import InferenceServerException

from deploy import doctor, servers
from deploy.embedded.server import TritonServer, free_ports
from deploy.finding import Finding
from mst_gan_client.serving.security import Security

NOTHING = Security()


class Answering(FakeTriton):
    """Tells its version, and knows its models by name."""

    def ServerMetadata(self, request, context):  # noqa: N802
        return service_pb2.ServerMetadataResponse(name="triton", version="2.71.0")

    def ModelInfer(self, request, context):  # noqa: N802
        if request.model_name != "mst_gan":
            message = f"Request for unknown model: '{request.model_name}' is not found"
            context.abort(grpc.StatusCode.NOT_FOUND, message)
        return super().ModelInfer(request, context)


@pytest.fixture
def triton() -> Iterator[Answering]:
    with Answering() as server:
        yield server


def ask(proxy: Proxy) -> dict[str, Finding]:
    """Findings about what is behind a proxy, by check; the last of each."""
    security = Security(ca=proxy.certificate, token=TOKEN)
    found = servers.check_servers([f"grpcs://localhost:{proxy.port}"], security, 0)
    return {finding.check: finding for finding in found}


def test_a_proxy_that_cuts_messages_at_4_mb(tmp_path: Path, triton: Answering) -> None:
    with nginx(tmp_path, [triton.url], **{"client_max_body_size 64m": "client_max_body_size 4m"}) as proxy:
        finding = ask(proxy)["message size"]
    assert finding.level == "error" and finding.text.startswith("requests of more than 4 MB do not pass")
    assert finding.fix.endswith("nginx: client_max_body_size 64m")


def test_a_proxy_as_it_should_be(tmp_path: Path, triton: Answering) -> None:
    with nginx(tmp_path, [triton.url]) as proxy:
        found = ask(proxy)
    assert set(found) == {"certificate", "clock", "server", "client memory", "release", "message size"}
    assert {name for name, finding in found.items() if finding.level != "ok"} == {"client memory"}


def test_answers_that_are_cut(triton: Answering) -> None:
    class Cutting(InferenceServerClient):
        def infer(self, model, inputs, **options):
            if model == "mst_gan":
                raise InferenceServerException("Sent message larger than max (4320000 vs. 4194304)")
            return super().infer(model, inputs, **options)

    with Cutting(triton.url) as client:
        finding = servers.check_messages(client, triton.url)
    assert finding.level == "error" and finding.text.startswith("answers of more than 4 MB do not pass")


@pytest.mark.server
def test_the_embedded_server(toy_server: TritonServer) -> None:
    port = int(toy_server.metrics_url.rpartition(":")[2])
    found = {one.check: one for one in servers.check_servers([toy_server.grpc_url], NOTHING, port)}
    assert found["server"].text.startswith("Triton 2.51.0")
    assert found["release"].text.startswith(f"{toy_server.grpc_url} serves release ")
    assert found["release"].text.endswith(": toy fp32 000000000000")
    assert (found["message size"].level, found["metrics"].level) == ("ok", "ok")


@pytest.mark.parametrize(("since", "until", "state"), [
    ("20480101", "20490101", "not valid yet"), ("20200101", "20200201", "expired"),
])  # fmt: skip
def test_a_certificate_out_of_time(
    tmp_path: Path, triton: Answering, monkeypatch: pytest.MonkeyPatch, since: str, until: str, state: str
) -> None:
    with nginx(tmp_path, [triton.url], since=since, until=until) as proxy:
        finding = ask(proxy)["certificate"]
        assert finding.level == "error" and f"{state} by this machine's clock" in finding.text
        assert finding.fix.startswith("renew the certificate")
        now = time.time()
        monkeypatch.setattr(time, "time", lambda: now - 86400)  # this machine's clock is off
        found = ask(proxy)
    assert found["certificate"].fix == "set this machine's clock"
    assert found["clock"].level == "error"
    behind = re.fullmatch(r"this machine's is (\d+) s behind localhost:\d+'s", found["clock"].text)
    assert behind and 86400 - 60 <= int(behind[1]) <= 86400 + 600


def test_a_clock_that_is_off(tmp_path: Path, triton: Answering, monkeypatch: pytest.MonkeyPatch) -> None:
    with nginx(tmp_path, [triton.url]) as proxy:
        now = time.time()
        monkeypatch.setattr(time, "time", lambda: now + 3600)
        found = ask(proxy)
    assert found["certificate"].level == "ok"
    assert found["clock"].level == "error" and "s ahead of localhost" in found["clock"].text
    assert found["clock"].fix.startswith("timedatectl set-ntp true")


def test_an_unknown_authority(tmp_path: Path, triton: Answering) -> None:
    with nginx(tmp_path, [triton.url]) as proxy:
        url = f"grpcs://localhost:{proxy.port}"
        found = list(servers.check_servers([url], Security(token=TOKEN), 0))
    assert (found[-1].check, found[-1].level, found[-1].fix) == ("certificate", "error", "--tls-ca FILE")


def test_no_tls_there(triton: Answering) -> None:
    (finding,) = servers.check_servers([f"grpcs://{triton.url}"], NOTHING, 0)
    assert (finding.check, finding.level) == ("certificate", "error") and "expected TLS at" in finding.text
    (finding,) = servers.check_servers([triton.url], Security(token="secret"), 0)
    assert finding.level == "error" and "expected TLS for --token" in finding.text


def test_metrics_out_of_reach(triton: Answering) -> None:
    (port,) = free_ports(1)
    finding = {one.check: one for one in servers.check_servers([triton.url], NOTHING, port)}["metrics"]
    assert finding.level == "warn" and f"http://127.0.0.1:{port}/metrics, found none" in finding.text
    assert "--metrics-port" in finding.fix
    with http_server() as other:
        assert "another server's" in servers.check_metrics(triton.url, other).text


def test_servers_of_two_releases() -> None:
    one, two = ensemble_config(version="0.2.0"), ensemble_config(version="0.3.0")
    with Answering(config=one) as a, Answering(config=two) as b, Answering(config=one) as c:
        found = list(servers.check_servers([a.url, b.url], NOTHING, 0))
        same = list(servers.check_servers([a.url, c.url], NOTHING, 0))
    assert found[-1].level == "warn" and found[-1].check == "release"
    assert found[-1].text == f"{a.url} serves release 0.2.0, {b.url} serves release 0.3.0"
    assert [finding.level for finding in same if finding.check == "release"] == ["ok", "ok"]


@pytest.mark.parametrize(("version", "levels"), [("2.66.0", ["error"]), ("2.67.0", [])])
def test_a_limit_of_queues_at_a_server_that_can_hang(version: str, levels: list[str]) -> None:
    class Limited(Answering):
        def ModelConfig(self, request, context):  # noqa: N802
            config = stage_config(request.name)
            config.dynamic_batching.priority_queue_policy[2].max_queue_size = int(request.name == "generator")
            return service_pb2.ModelConfigResponse(config=config)

    with Limited() as triton, InferenceServerClient(triton.url) as client:
        found = list(servers.check_queues(client, ensemble_config(), version, triton.url))
    assert [finding.level for finding in found] == levels
    assert all(finding.text.startswith(f"generator at {triton.url} has max_queue_size") for finding in found)


def test_a_server_without_the_ensemble() -> None:
    with Answering(config=ensemble_config()) as triton:
        triton.config.name = "another"
        found = list(servers.check_servers([triton.url], NOTHING, 0))
    assert (found[-1].check, found[-1].level) == ("ensemble", "error")


def test_options(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = SimpleNamespace()

    def note(*arguments: object) -> Iterator[Finding]:
        seen.arguments = arguments
        yield Finding("ok", "a", "fine")

    monkeypatch.setattr(doctor, "check_servers", note)
    options = ["--url", "a,grpcs://b", "--token", "t", "--tls-ca", "ca.pem", "--metrics-port", "9"]
    CliRunner().invoke(doctor.main, options)
    assert seen.arguments == (["a", "grpcs://b"], Security(ca=Path("ca.pem"), token="t"), 9)
