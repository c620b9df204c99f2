"""``deploy/kubernetes`` and ``deploy/farm``: rendered, and valid for two versions of Kubernetes' API."""

from __future__ import annotations

import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from requirements import missing
from test_compose import SECRET, service

from deploy import doctor

DEPLOY = Path(doctor.__file__).parent
VERSIONS = ("1.29", "1.35")
OVERLAYS = ("cpu", "gpu", "canary")
JOBS = sorted(DEPLOY.glob("farm/kubernetes-*.yaml"))

Object = dict[str, Any]


def build(folder: Path) -> dict[str, Object]:
    """What kustomize makes of a folder, by kind."""
    if shutil.which("kustomize"):
        command = ["kustomize", "build"]
    elif shutil.which("kubectl"):
        command = ["kubectl", "kustomize"]
    else:
        missing("ALL", "no kustomize or kubectl found")
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    objects = {found["kind"]: found for found in yaml.safe_load_all(done.stdout)}
    assert objects
    return objects


@cache
def overlay(name: str) -> dict[str, Object]:
    return build(DEPLOY / "kubernetes" / name)


def server(objects: dict[str, Object]) -> Object:
    (container,) = objects["Deployment"]["spec"]["template"]["spec"]["containers"]
    found: Object = container
    return found


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", OVERLAYS)
def test_every_object_fits_the_schema_of_the_api(name: str, version: str) -> None:
    objects = overlay(name)
    assert {"Deployment", "Service", "PodDisruptionBudget", "NetworkPolicy"} <= set(objects)
    for found in objects.values():
        kubernetes_validate.validate(found, version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_every_job_of_the_farm_fits_the_schema_of_the_api(path: Path, version: str) -> None:
    kubernetes_validate.validate(yaml.safe_load(path.read_text()), version, strict=True)


def test_a_wrong_field_is_found() -> None:
    wrong = yaml.safe_load((DEPLOY / "kubernetes/base/disruption.yaml").read_text())
    wrong["spec"]["maxUnavailible"] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSIONS[0], strict=True)


@pytest.mark.parametrize("name", OVERLAYS)
def test_servers_are_hardened_and_probed_with_frames(name: str) -> None:
    objects = overlay(name)
    pod = objects["Deployment"]["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] and not pod["automountServiceAccountToken"]
    container = server(objects)
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    for probe in ("readinessProbe", "startupProbe"):
        assert container[probe]["httpGet"]["path"] == "/v2/models/mst_gan/ready"
    program = container["livenessProbe"]["exec"]["command"][-1]
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    assert program == "/opt/mst-gan/deploy/alive.py" and program in dockerfile


def test_arguments_are_those_of_compose_which_a_server_takes() -> None:
    arguments = [value.replace("$(ADMIN_KEY)", SECRET) for value in server(overlay("cpu"))["args"]]
    assert arguments == service("cpu-1")["command"]
    for flag in ("--cuda-memory-pool-byte-size", "--pinned-memory-pool-byte-size", "--allow-client-shm"):
        (wanted,) = (value for value in service("gpu")["command"] if value.startswith(flag))
        assert wanted in server(overlay("gpu"))["args"]


def test_no_request_to_the_stable_servers_reaches_the_canary() -> None:
    stable, canary = overlay("cpu"), overlay("canary")
    paths = {
        "Service": ("spec", "selector"),
        "Deployment": ("spec", "selector", "matchLabels"),
        "PodDisruptionBudget": ("spec", "selector", "matchLabels"),
        "NetworkPolicy": ("spec", "podSelector", "matchLabels"),
    }
    for objects, other in ((stable, canary), (canary, stable)):
        labels = objects["Deployment"]["spec"]["template"]["metadata"]["labels"]
        foreign = other["Deployment"]["spec"]["template"]["metadata"]["labels"]
        for kind, path in paths.items():
            selector = objects[kind]
            for key in path:
                selector = selector[key]
            assert selector and selector.items() <= labels.items()
            assert not selector.items() <= foreign.items()
    assert stable["Service"]["metadata"]["name"] != canary["Service"]["metadata"]["name"]


def test_the_farm_reaches_the_servers() -> None:
    found = overlay("cpu")
    assert found["Service"]["spec"]["clusterIP"] == "None"  # a name with the address of every server
    job = yaml.safe_load((DEPLOY / "farm/kubernetes-shards.yaml").read_text())["spec"]["template"]
    (url,) = (
        value["value"] for value in job["spec"]["containers"][0]["env"] if value["name"] == "UPSCALE_URL"
    )
    port = next(port["port"] for port in found["Service"]["spec"]["ports"] if port["name"] == "grpc")
    assert url == f"dns:///{found['Service']['metadata']['name']}:{port}"
    (allowed,) = (
        rule for rule in found["NetworkPolicy"]["spec"]["ingress"] if rule["ports"][0]["port"] == port
    )
    selector = allowed["from"][0]["podSelector"]["matchLabels"]
    assert selector.items() <= job["metadata"]["labels"].items()


def test_both_autoscalers_have_the_same_thresholds(tmp_path: Path) -> None:
    hpa = overlay("cpu")["HorizontalPodAutoscaler"]["spec"]
    shutil.copytree(DEPLOY / "kubernetes", tmp_path / "kubernetes")
    changed = tmp_path / "kubernetes/cpu/kustomization.yaml"
    changed.write_text(changed.read_text().replace("[../scale-hpa]", "[../scale-keda]"))
    objects = build(changed.parent)
    assert "HorizontalPodAutoscaler" not in objects  # KEDA makes its own
    keda = objects["ScaledObject"]["spec"]
    assert keda["scaleTargetRef"]["name"] == hpa["scaleTargetRef"]["name"] == "mst-gan"
    thresholds = [trigger["metadata"]["threshold"] for trigger in keda["triggers"]]
    assert thresholds == [metric["pods"]["target"]["averageValue"] for metric in hpa["metrics"]]
    assert "replicas" not in overlay("cpu")["Deployment"]["spec"]  # applying it again would undo the scaling
