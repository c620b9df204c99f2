"""``deploy/Dockerfile`` built, ``deploy/compose.yaml`` run: servers, proxy and Prometheus, one server killed.

``make test-deploy`` runs these; they need a Docker engine with Compose. Where no registry can be reached,
``deploy/debian-images.sh`` makes the base images, and their names are given in ``BASE_IMAGE``,
``NGINX_IMAGE`` and ``PROMETHEUS_IMAGE``.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from client_fakes import decoded, write_clip
from requirements import missing
from test_nginx import TOKEN, make_certificate

from deploy.demo import read_frames, reduce
from deploy.embedded.server import free_ports
from export.data.sample import sample_clip

pytestmark = [pytest.mark.docker, pytest.mark.timeout(1200)]

ROOT = Path(__file__).parents[2]
PROJECT = "mst-gan-test"
USER = 1000
FRAMES = 150
PATIENCE_S = 120
IMAGES = {"client": "mst-gan-client:test", "server": "mst-gan-server:test"}
MAX_MB = {"client": 500, "server": 550}
CONTAINERS = ("cpu-1", "cpu-2", "proxy", "prometheus")


def docker(*arguments: str, **environment: str) -> str:
    """Standard output of a docker command that must end well."""
    done = subprocess.run(
        ["docker", *arguments], cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"no {what} in {PATIENCE_S} s"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def images() -> dict[str, str]:
    """Both images, built without a network."""
    try:
        subprocess.run(["docker", "compose", "version"], check=True, capture_output=True)
        subprocess.run(["docker", "info"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        missing("DOCKER", "no Docker engine with Compose found")
    base = os.environ.get("BASE_IMAGE")
    for target, tag in IMAGES.items():
        arguments = ["--build-arg", f"BASE={base}"] if base else []
        docker(
            "build", "--file=deploy/Dockerfile", "--network=none", f"--target={target}", f"--tag={tag}",
            *arguments, ".",
        )  # fmt: skip
    return IMAGES


@pytest.fixture(scope="module")
def proxy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the proxy wants, readable to its user."""
    folder = tmp_path_factory.mktemp("proxy")
    make_certificate(folder, "20490101")
    (folder / "nginx.conf").touch()  # where Compose mounts the committed one
    (folder / "servers.conf").write_text("server triton:8001 max_fails=1 fail_timeout=5s;\n")
    (folder / "tokens.map").write_text(f'"Bearer {TOKEN}" 1;\n')
    for path in (folder, *folder.rglob("*")):
        os.chown(path, USER, USER)
    return folder


@pytest.fixture(scope="module")
def stack(images: dict[str, str], proxy_folder: Path) -> Iterator[dict[str, int]]:
    """Compose's services, healthy; yields their ports."""
    names = [
        "HTTP_PORT", "GRPC_PORT", "METRICS_PORT", "HTTP_PORT_2", "GRPC_PORT_2", "METRICS_PORT_2",
        "PROXY_PORT", "PROMETHEUS_PORT",
    ]  # fmt: skip
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    environment = {
        "SERVER_IMAGE": images["server"],
        "TRITON_ADMIN_KEY": "some-secret",
        "PROXY_FOLDER": str(proxy_folder),
        **{name: str(port) for name, port in ports.items()},
    }
    compose = ["compose", f"--project-name={PROJECT}", "--file=deploy/compose.yaml"]
    compose += ["--profile=cpu", "--profile=front"]
    try:
        docker(*compose, "up", "--detach", "--wait", *CONTAINERS, **environment)
        yield ports
    finally:
        sys.stdout.write(
            docker(*compose, "logs", "--tail=20", **environment)
        )  # pytest shows it after a failure
        docker(*compose, "down", "--volumes", "--timeout=5", **environment)


def container(service: str) -> str:
    return f"{PROJECT}-{service}-1"


def inspect(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(docker("inspect", name))[0]
    return found


def query(ports: dict[str, int], expression: str) -> list[dict[str, Any]]:
    """What Prometheus answers."""
    url = f"http://127.0.0.1:{ports['PROMETHEUS_PORT']}/api/v1/query?query={urllib.parse.quote(expression)}"
    with urllib.request.urlopen(url, timeout=10) as answer:
        found: list[dict[str, Any]] = json.load(answer)["data"]["result"]
    return found


def client_command(folder: Path, image: str, out: str, *options: str) -> list[str]:
    """The client's container, as hardened as the servers."""
    return [
        "docker", "run", "--rm", f"--name={PROJECT}-client", "--network=host", "--read-only",
        "--cap-drop=ALL", "--security-opt=no-new-privileges", "--tmpfs=/tmp", f"--volume={folder}:/films",
        image, "in.mkv", out, "--codec=ffv1", "--pix-fmt=bgr0", *options,
    ]  # fmt: skip


@pytest.fixture
def films(tmp_path: Path, proxy_folder: Path) -> Path:
    """A folder with a piece of a real clip, which the client's user can write to."""
    folder = tmp_path / "films"
    folder.mkdir()
    frames, rate = read_frames(sample_clip(), 100, 50)
    frames = [reduce(frame) for frame in frames]
    frames = (frames + frames[::-1] + frames)[:FRAMES]
    write_clip(folder / "in.mkv", frames, rate=rate, codec="ffv1", pix_fmt="bgr0")
    (folder / "ca.pem").write_bytes((proxy_folder / "certificate.pem").read_bytes())
    for path in (folder, *folder.iterdir()):
        os.chown(path, USER, USER)
    for parent in (tmp_path, *tmp_path.parents[:2]):
        parent.chmod(0o755)
    return folder


@pytest.mark.parametrize("target", list(IMAGES))
def test_an_image_is_small_and_runs_as_an_ordinary_user(images: dict[str, str], target: str) -> None:
    found = inspect(images[target])
    assert found["Size"] < MAX_MB[target] * 1e6, f"{found['Size'] / 1e6:.0f} MB"
    assert found["Config"]["User"] == f"{USER}:{USER}"
    assert ("alive.py" in str(found["Config"].get("Healthcheck"))) == (target == "server")


def test_every_container_is_hardened_while_it_runs(stack: dict[str, int]) -> None:
    for service in CONTAINERS:
        found = inspect(container(service))
        assert found["HostConfig"]["ReadonlyRootfs"] and found["HostConfig"]["CapDrop"] == ["ALL"]
        with open(f"/proc/{found['State']['Pid']}/status") as status:
            fields = dict(line.rstrip("\n").split(":\t", 1) for line in status if ":\t" in line)
        assert int(fields["CapEff"], 16) == int(fields["CapPrm"], 16) == int(fields["CapBnd"], 16) == 0
        assert fields["NoNewPrivs"] == "1"
        assert "0" not in fields["Uid"].split()
        written = subprocess.run(["docker", "exec", container(service), "sh", "-c", "echo > /file"])
        assert written.returncode != 0


def test_a_film_survives_a_killed_server_bit_for_bit(
    images: dict[str, str], stack: dict[str, int], films: Path
) -> None:
    wait_until(lambda: len(query(stack, 'up{job="triton"} == 1')) == 2, "two servers in Prometheus")
    one = f"--url=localhost:{stack['GRPC_PORT']}"
    subprocess.run(client_command(films, images["client"], "one.mkv", one), check=True)

    proxy = [f"--url=grpcs://localhost:{stack['PROXY_PORT']}", "--tls-ca=ca.pem", f"--token={TOKEN}"]
    second = f"http://127.0.0.1:{stack['METRICS_PORT_2']}/metrics"

    def done_by_second() -> int:
        """Frames, also the few of health checks."""
        with urllib.request.urlopen(second, timeout=10) as answer:
            text = answer.read().decode()
        found = re.search(r'^nv_inference_count\{model="mst_gan",.*\} (\d+)', text, re.MULTILINE)
        assert found
        return int(found[1])

    before = done_by_second()
    with subprocess.Popen(client_command(films, images["client"], "two.mkv", *proxy)) as client:
        wait_until(lambda: done_by_second() >= before + FRAMES // 6, "frames of the second server")
        assert client.poll() is None
        docker("kill", container("cpu-2"))
        assert client.poll() is None
        assert client.wait(PATIENCE_S) == 0

    first, other = decoded(films / "one.mkv"), decoded(films / "two.mkv")
    assert len(first) == FRAMES
    for expected, found in zip(first, other, strict=True):
        assert np.array_equal(expected, found)
    assert inspect(container("cpu-2"))["State"]["Running"] is False
    wait_until(lambda: len(query(stack, 'up{job="triton"} == 1')) == 1, "lost server in Prometheus")
    wait_until(lambda: bool(query(stack, "mst_gan:frames:rate1m")), "recorded rate in Prometheus")


def test_the_health_check_turns_red_when_an_instance_is_dead(stack: dict[str, int]) -> None:
    probe = ["docker", "exec", container("cpu-1"), "python", "/opt/mst-gan/deploy/alive.py"]
    assert subprocess.run(probe).returncode == 0
    find = "grep -l [g]enerator/1/model /proc/[0-9]*/cmdline | cut -d/ -f3 | head -1"
    pid = docker("exec", container("cpu-1"), "sh", "-c", find)
    docker("exec", container("cpu-1"), "sh", "-c", f"kill -9 {pid}")
    red = subprocess.run(probe, capture_output=True, text=True)
    assert red.returncode == 1 and "not healthy" in red.stderr
    ready = f"http://127.0.0.1:{stack['HTTP_PORT']}/v2/models/mst_gan/ready"
    with urllib.request.urlopen(ready, timeout=10) as answer:  # Triton's own word
        assert answer.status == 200
