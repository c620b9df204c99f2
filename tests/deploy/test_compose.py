"""``deploy/compose.yaml``: valid, hardened, and with arguments that Triton understands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tritonclient.grpc as grpcclient
from toy_models import build_busy_repository
from tritonclient.utils import InferenceServerException

from deploy import doctor, servers
from deploy.embedded.server import TritonServer

COMPOSE = Path(doctor.__file__).with_name("compose.yaml")
SECRET = "some-secret"
SERVERS = ("gpu", "cpu-1", "cpu-2")
FRONT = ("proxy", "prometheus", "grafana")


def service(name: str) -> dict[str, Any]:
    """A service as Compose resolves it with nothing set but the secret."""
    import yaml

    text = COMPOSE.read_text()
    text = text.replace("${TRITON_ADMIN_KEY:?set it to a secret}", SECRET)
    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)
    assert "${" not in text
    found: dict[str, Any] = yaml.safe_load(text)["services"][name]
    return found


def check_schema(file: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", file]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True)


def test_it_fits_the_schema_of_compose(tmp_path: Path) -> None:
    checked = check_schema(COMPOSE)
    assert checked.returncode == 0, checked.stdout

    wrong = tmp_path / "compose.yaml"
    wrong.write_text(COMPOSE.read_text().replace("read_only: true\n  cap", "read_only: 7\n  cap", 1))
    assert check_schema(wrong).returncode == 1


@pytest.mark.parametrize("name", [*SERVERS, *FRONT])
def test_every_container_is_hardened(name: str) -> None:
    found = service(name)

    assert found["user"].split(":")[0] != "0"
    assert found["read_only"] is True
    assert found["cap_drop"] == ["ALL"]
    assert found["security_opt"] == ["no-new-privileges:true"]
    assert all(port.startswith("127.0.0.1:") for port in found["ports"])
    assert all(volume["read_only"] for volume in found.get("volumes", []) if volume["type"] == "bind")


@pytest.mark.parametrize("name", SERVERS)
def test_every_server_keeps_to_itself_and_is_probed_with_frames(name: str) -> None:
    server = service(name)

    assert server["profiles"] == [name.partition("-")[0]]
    restricted = [argument for argument in server["command"] if "restricted" in argument]
    assert len(restricted) == 2 and all("model-repository" in argument for argument in restricted)
    # The embedded server's version cannot turn clients' shared memory off.
    assert "--allow-client-shm=false" in server["command"] or all("shared-memory" in a for a in restricted)
    assert server["healthcheck"]["test"][-1] == "/opt/mst-gan/deploy/alive.py"


def test_nvidias_release_has_all_security_fixes() -> None:
    release = re.fullmatch(r"nvcr\.io/nvidia/tritonserver:([\d.]+)-py3", service("gpu")["image"])
    assert release and list(servers.SECURITY_FIXES.values())[-1].endswith(f"({release[1]})")


def test_it_does_not_start_without_a_secret() -> None:
    assert len(re.findall(r"admin-key=\$\{TRITON_ADMIN_KEY:\?", COMPOSE.read_text())) == 4


def test_memory_pools_are_large_enough_for_the_largest_frames() -> None:
    command = " ".join(service("gpu")["command"])
    for finding in doctor.check_pools((720, 1280), ["8.9"]):
        flag, _, wanted = finding.fix.partition("=")
        given = re.search(rf"{flag}=(?:0:)?(\d+)", command)
        assert given and int(given[1]) >= int(wanted.removeprefix("0:"))


@pytest.mark.server
def test_triton_takes_its_arguments_and_keeps_administration_to_who_has_the_secret(tmp_path: Path) -> None:
    models = tmp_path / "model_repository"
    build_busy_repository(models)
    arguments = service("cpu-1")["command"]

    with (
        TritonServer(models, tmp_path / "triton.log", *arguments) as server,
        grpcclient.InferenceServerClient(server.grpc_url) as client,
    ):
        assert client.is_model_ready("busy")
        assert client.get_model_config("busy").config.name == "busy"
        with pytest.raises(
            InferenceServerException, match="expecting header 'triton-grpc-protocol-admin-key'"
        ):
            client.get_model_repository_index()
        index = client.get_model_repository_index(headers={"triton-grpc-protocol-admin-key": SECRET})
        assert [model.name for model in index.models] == ["busy"]
