"""``deploy/monitoring``: rules that Prometheus takes, alerts that fire when they should, and real metrics."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpcclient
from requirements import missing

from deploy import doctor
from deploy.embedded.server import TritonServer, free_ports
from export import spec

MONITORING = Path(doctor.__file__).with_name("monitoring")
TESTS = Path(__file__).with_name("monitoring_rules_test.yml")
PATIENCE_S = 60


def program(name: str) -> str:
    """Path of ``promtool`` or ``prometheus``."""
    return shutil.which(name) or missing("PROMETHEUS", f"no {name} found: apt-get install prometheus")


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


@pytest.mark.server
def test_every_recorded_series_has_values_of_a_real_server(toy_server: TritonServer, tmp_path: Path) -> None:
    rules = (MONITORING / "rules.yml").read_text()
    (tmp_path / "rules.yml").write_text(rules)
    configuration = (MONITORING / "prometheus.yml").read_text()
    configuration = configuration.replace("15s", "1s").replace("localhost:8002", toy_server.metrics_url)
    (tmp_path / "prometheus.yml").write_text(configuration)
    (port,) = free_ports(1)
    wanted = re.findall(r"- record: (\S+)", rules)
    command = [
        program("prometheus"), f"--config.file={tmp_path / 'prometheus.yml'}",
        f"--storage.tsdb.path={tmp_path / 'data'}", f"--web.listen-address=127.0.0.1:{port}",
    ]  # fmt: skip
    with (
        (tmp_path / "log").open("wb") as log,
        subprocess.Popen(command, stdout=log, stderr=log) as prometheus,
        grpcclient.InferenceServerClient(toy_server.grpc_url) as client,
    ):
        try:
            deadline = time.monotonic() + PATIENCE_S
            while not all(values(port, name) for name in wanted):
                assert time.monotonic() < deadline, {name: values(port, name) for name in wanted}
                upscale(client)
            assert values(port, 'up{job="triton"}') == [1.0]
            assert min(values(port, "mst_gan:frames:rate1m")) > 0
            assert min(values(port, "mst_gan:latency_seconds:mean1m")) > 0
            assert all(1 <= size <= spec.MAX_BATCH for size in values(port, "mst_gan:batch_size:mean1m"))
        finally:
            prometheus.kill()


def values(port: int, query: str) -> list[float]:
    """Values of a query now, without those that are not a number: models that nobody asked."""
    url = f"http://127.0.0.1:{port}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            result: list[dict[str, Any]] = json.load(answer)["data"]["result"]
    except OSError:  # not up yet
        return []
    return [value for series in result if not np.isnan(value := float(series["value"][1]))]


def upscale(client: grpcclient.InferenceServerClient) -> None:
    lr_window = grpcclient.InferInput(spec.LR_WINDOW.name, spec.LR_WINDOW.shape(1, (16, 16)), "UINT8")
    lr_window.set_data_from_numpy(np.zeros(spec.LR_WINDOW.shape(1, (16, 16)), np.uint8))
    client.infer(spec.ENSEMBLE.name, [lr_window])
    time.sleep(0.2)
