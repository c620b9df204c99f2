"""``deploy/monitoring``: rules that Prometheus takes, alerts that fire when they should, and real metrics."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from requirements import missing

from deploy.embedded.server import TritonServer, free_ports
from deploy.monitoring import draw
from export import spec

MONITORING = Path(draw.__file__).parent
TESTS = Path(__file__).with_name("monitoring_rules_test.yml")
PATIENCE_S = 60
NODE_EXPORTER_FLAG = (
    "--collector.filesystem.mount-points-exclude=^/(proc|sys)($|/)"  # as deploy/README.md has it
)


def program(name: str) -> str:
    """Path of a program of Prometheus's packages."""
    found = shutil.which(name)
    return found or missing(
        "PROMETHEUS", f"no {name} found: apt-get install prometheus prometheus-node-exporter"
    )


def run_promtool(*arguments: str | Path, cwd: Path = MONITORING) -> None:
    done = subprocess.run([program("promtool"), *arguments], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_takes_the_configuration_and_its_rules() -> None:
    run_promtool("check", "config", "prometheus.yml")


def test_alerts_fire_when_they_should_and_only_then(tmp_path: Path) -> None:
    shutil.copy(MONITORING / "rules.yml", tmp_path)
    shutil.copy(TESTS, tmp_path)
    run_promtool("test", "rules", TESTS.name, cwd=tmp_path)


def test_every_alert_is_seen_firing() -> None:
    alerts = set(re.findall(r"- alert: (\w+)", (MONITORING / "rules.yml").read_text()))
    assert alerts == set(re.findall(r'alertname="(\w+)"', TESTS.read_text()))


NOT_HERE = {"GPU memory used", "GPU utilization"}
"""Panels whose series only a machine with a GPU has: they may be empty."""


def test_every_panel_of_the_dashboard_stands_on_free_ground() -> None:
    dashboard = json.loads((MONITORING / "dashboard.json").read_text())
    places = [
        (place["x"] + x, place["y"] + y)
        for place in (panel["gridPos"] for panel in dashboard["panels"])
        for x in range(place["w"])
        for y in range(place["h"])
    ]
    assert len(places) == len(set(places)) and max(x for x, _ in places) < 24  # Grafana's columns
    titles = [panel["title"] for panel in dashboard["panels"]]
    assert len(set(titles)) == len(titles) and set(titles) > NOT_HERE
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(titles)


@pytest.mark.server
def test_rules_and_dashboard_have_values_of_real_servers_and_clients(
    toy_server: TritonServer, tmp_path: Path
) -> None:
    """Prometheus scrapes the embedded server, a client at work and node_exporter."""
    shutil.copy(MONITORING / "rules.yml", tmp_path)
    port, client_port, node_port = free_ports(3)
    configuration = (MONITORING / "prometheus.yml").read_text().replace("15s", "1s")
    for target, here in (
        ("localhost:8002", toy_server.metrics_url),
        ("localhost:8003", f"127.0.0.1:{client_port}"),
        ("localhost:9100", f"127.0.0.1:{node_port}"),
    ):
        assert target in configuration
        configuration = configuration.replace(target, here)
    (tmp_path / "prometheus.yml").write_text(configuration)
    recorded = re.findall(r"- record: (\S+)", (MONITORING / "rules.yml").read_text())
    queries = {f"{title}: {query}": query for title, _, all_of in draw.panels() for query, _ in all_of}
    expected = [query for name, query in queries.items() if name.split(":")[0] not in NOT_HERE]
    url = f"http://127.0.0.1:{port}"
    with ExitStack() as stack:
        start(
            stack, program("prometheus"), f"--config.file={tmp_path / 'prometheus.yml'}",
            f"--storage.tsdb.path={tmp_path / 'data'}", f"--web.listen-address=127.0.0.1:{port}",
        )  # fmt: skip
        start(
            stack, program("prometheus-node-exporter"), "--collector.disable-defaults",
            "--collector.filesystem", NODE_EXPORTER_FLAG, f"--web.listen-address=127.0.0.1:{node_port}",
        )  # fmt: skip
        client = start(
            stack, sys.executable, "-m", "mst_gan_client", "-", str(tmp_path / "out.mkv"),
            "--url", toy_server.grpc_url, "--metrics-port", str(client_port),
            "--codec", "ffv1", stdin=subprocess.PIPE,
        )  # fmt: skip
        assert client.stdin
        client.stdin.write(b"YUV4MPEG2 W32 H16 F25:1 C420\n")
        deadline = time.monotonic() + PATIENCE_S
        while missing_values := [query for query in [*recorded, *expected] if not values(url, query)]:
            assert time.monotonic() < deadline, missing_values
            client.stdin.write(b"FRAME\n" + bytes(32 * 16 * 3 // 2))
            client.stdin.flush()
            time.sleep(0.02)
        assert min(values(url, "mst_gan:frames:rate1m")) > 0
        assert min(values(url, "mst_gan:latency_seconds:mean1m")) > 0
        assert all(1 <= size <= spec.MAX_BATCH for size in values(url, "mst_gan:batch_size:mean1m"))
        assert values(url, "up") == [1.0] * 3
        labels = draw.ask(url, "query", query="mst_gan_client_server_info")[0]["metric"]
        assert (labels["server"], labels["weights"]) == (toy_server.grpc_url, "toy")
        picture = tmp_path / "dashboard.png"
        result = CliRunner().invoke(draw.main, [str(picture), "--url", url, "--minutes", "1"])
        assert result.exit_code == 0, result.output
        assert picture.read_bytes().startswith(b"\x89PNG")
        client.stdin.close()
        assert client.wait(PATIENCE_S) == 0


def test_picture_without_prometheus(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    result = CliRunner().invoke(draw.main, [str(tmp_path / "a.png"), "--url", f"http://127.0.0.1:{port}"])
    assert result.exit_code == 1 and "expected Prometheus at" in result.output


def start(stack: ExitStack, *command: str, **options: Any) -> subprocess.Popen[bytes]:
    """Start a program that ends with the stack."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **options)
    stack.callback(process.wait)
    stack.callback(process.kill)
    return process


def values(url: str, query: str) -> list[float]:
    """Values of a query now, without those that are not a number: models that nobody asked."""
    try:
        result = draw.ask(url, "query", query=query)
    except OSError:  # not up yet
        return []
    return [value for series in result if not np.isnan(value := float(series["value"][1]))]
