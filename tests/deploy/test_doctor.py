"""``make doctor``: each finding, caused by a fake of its cause, with the exact fix."""

from __future__ import annotations

import json
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from deploy import doctor
from deploy.doctor import Finding
from deploy.embedded.launcher import LaunchError
from export import spec
from export.repository import Weights, install, write_configs
from mst_gan_client.serving.security import Security

HD = (720, 1280)


def fail(error: Exception):
    def raise_it(*_: object, **__: object) -> None:
        raise error

    return raise_it


def test_bytes_of_a_frame() -> None:
    assert doctor.frame_bytes([spec.SUBPIXELS], HD) == 48 * 720 * 1280
    assert doctor.frame_bytes([spec.LR_WINDOW], HD) == 3 * 720 * 1280 * 3


@pytest.mark.parametrize(("free", "level"), [(4 << 30, "ok"), (64 << 20, "error")])
def test_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, level: str) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    finding = doctor.check_shm(HD, tmp_path)
    assert finding.level == level
    assert "full batches at 1280x720 take at most 1673 MB" in finding.text
    assert ("--shm-size=2g" in finding.fix) == (level == "error")


def test_no_shared_memory(tmp_path: Path) -> None:
    assert doctor.check_shm(HD, tmp_path / "none").fix == "mount it: mount -t tmpfs tmpfs /dev/shm"


def test_pools_too_small_for_the_resolution() -> None:
    cuda, pinned = doctor.check_pools(HD, ["8.9"])
    assert (cuda.level, pinned.level) == ("warn", "warn")
    assert cuda.fix == "--cuda-memory-pool-byte-size=0:1610612736"
    assert pinned.fix == "--pinned-memory-pool-byte-size=671088640"
    assert {f.level for f in doctor.check_pools((16, 16), ["8.9"])} == {"ok"}
    assert {f.level for f in doctor.check_pools(HD, [])} == {"ok"}  # nothing to set without a GPU


@pytest.mark.parametrize(
    ("version", "lacking"),
    [
        ("2.51.0", ["5816", "5828", "5848", "5853", "5865", "5875"]),
        ("2.65.0", ["5816", "5828", "5848", "5853", "5865", "5875"]),
        ("2.66.0", ["5828", "5848", "5853", "5865", "5875"]),
        ("2.67.0", ["5848", "5853", "5865", "5875"]),
        ("2.68.0", ["5853", "5865", "5875"]),
        ("2.69.0", ["5865", "5875"]),
        ("2.70.0", ["5875"]),
        ("2.71.0", []), ("2.72.0", []), ("2.100.0", []), ("3.0.0", []),
    ],
)  # fmt: skip
def test_an_older_server_lacks_every_later_fix(version: str, lacking: list[str]) -> None:
    security, _ = doctor.check_version(version, "host:8001")
    assert security.level == ("warn" if lacking else "ok")
    assert re.findall(r"\b5\d{3}\b", security.text) == lacking
    assert ("tritonserver:26.07-py3" in security.fix) == bool(lacking)


@pytest.mark.parametrize(
    ("version", "flag"), [("2.51.0", False), ("2.67.0", False), ("2.68.0", True), ("2.71.0", True)]
)
def test_the_flag_for_shared_memory_is_named_to_servers_that_know_it(version: str, flag: bool) -> None:
    _, memory = doctor.check_version(version, "host:8001")
    assert memory.level == ("warn" if flag else "ok")
    assert ("--allow-client-shm=true" in memory.fix) == flag


def test_no_server() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound, but not listening
        (finding,) = doctor.check_servers([f"127.0.0.1:{unused.getsockname()[1]}"], Security(), 0)
    assert finding.level == "error" and "expected a Triton server at 127.0.0.1:" in finding.text


def test_embedded_server(monkeypatch: pytest.MonkeyPatch) -> None:
    security, memory = doctor.check_embedded()
    assert security.level == "warn" and security.text.startswith("Triton 2.51.0, the embedded server: lacks")
    assert memory.level == "ok"
    monkeypatch.setattr(doctor, "find_wheel", fail(LaunchError("no wheel")))
    assert list(doctor.check_embedded()) == [Finding("error", "server", "no wheel", "make setup")]


def test_stub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "check_packages", fail(LaunchError("expected numpy < 2, found 2.1")))
    monkeypatch.setattr(doctor, "find_libpython", fail(LaunchError("expected libpython")))
    numpy, libpython = doctor.check_stub()
    assert numpy == Finding("error", "numpy", "expected numpy < 2, found 2.1", "make setup")
    assert libpython.level == "error" and libpython.fix.startswith("apt-get install libpython3.")


@pytest.fixture
def repository(toy_repository: Path, tmp_path: Path) -> Path:
    build, models = tmp_path / "build", tmp_path / "models"
    build.mkdir()
    for stage in spec.STAGES:
        shutil.copy(toy_repository / stage.name / "1/model.onnx", build / f"{stage.name}.onnx")
    write_configs(models)
    install(build, models, Weights("toy", "0" * 64))
    return models


def test_repository(repository: Path) -> None:
    assert [f.level for f in doctor.check_repository(repository)] == ["ok"] * 3
    generator = next(f for f in doctor.check_repository(repository) if f.check == "generator")
    assert generator.text == "serves model.onnx = model.fp32.onnx; --model-config-name: fp32"


def test_a_repository_with_half_of_the_streams(repository: Path) -> None:
    (repository / "stream_align").mkdir()
    found = {one.check: one for one in doctor.check_repository(repository) if one.level == "error"}
    assert set(found) == {"mst_gan_stream", "stream_align", "stream_generator"}
    assert {finding.fix for finding in found.values()} == {"make stream"}


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize(
    ("break_it", "check", "text", "fix"),
    [
        ((Path.unlink, "generator/1/model.onnx"), "generator", "is missing", "make export"),
        ((shutil.rmtree, "generator/1"), "generator", "the folder", "make export"),
        ((truncate, "generator/1/model.onnx"), "generator", "not a readable ONNX", "make export"),
        ((empty, "generator/1/model.onnx"), "generator", "found none", "make export"),
        ((shutil.rmtree, "pixel_shuffle"), "pixel_shuffle", "no readable config", "make configs"),
        ((truncate, "flow_align/config.pbtxt"), "flow_align", "no readable config", "make configs"),
        ((shutil.rmtree, "mst_gan/1"), "mst_gan", "even of an ensemble", "make configs"),
        ((Path.unlink, "mst_gan/config.pbtxt"), "mst_gan", "is missing", "make export"),
        ((Path.touch, "generator/1/model.onnx.part"), "repository", "model.onnx.part", "make export"),
    ],
)
def test_a_repository_half_written(
    repository: Path, break_it: tuple[Callable[[Path], object], str], check: str, text: str, fix: str
) -> None:
    change, path = break_it
    change(repository / path)
    (finding,) = [one for one in doctor.check_repository(repository) if one.level == "error"]
    assert (finding.check, finding.fix) == (check, fix) and text in finding.text


def test_plans(repository: Path) -> None:
    assert list(doctor.check_plans(["8.9"], repository)) == []
    plan = repository / "generator/1/model.sm89.plan"
    plan.write_bytes(b"plan")
    (finding,) = doctor.check_plans(["8.9"], repository)
    assert finding.level == "error" and "no readable identity beside it" in finding.text
    plan.with_name("model.sm89.plan.json").write_text(json.dumps({"version": "11.0", "gpus": ["8.9"]}))
    assert [f.level for f in doctor.check_plans(["8.9"], repository, "11.0")] == ["ok"]
    (finding,) = doctor.check_plans(["8.9"], repository, "11.1")
    assert finding.text.endswith("TensorRT 11.0, GPU 8.9; here is TensorRT 11.1")
    assert finding.fix == "make export TARGET=tensorrt"
    other = next(iter(doctor.check_plans(["12.0"], repository, "11.0")))
    assert other.text == "generator has model.sm89.plan, none for compute capability 12.0"
    plan.with_name("model.sm89.plan.json").write_text(json.dumps({"version": "11.0", "gpus": ["7.5"]}))
    (finding,) = doctor.check_plans(["8.9"], repository, "11.0")
    assert finding.level == "error" and "which its name does not say" in finding.text


def test_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as listener, socket.socket() as free:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        free.bind(("127.0.0.1", 0))
        taken, unused = listener.getsockname()[1], free.getsockname()[1]
        free.close()
        monkeypatch.setattr(doctor, "PORTS", {"http": taken, "grpc": unused})
        http, grpc = doctor.check_ports()
    assert (http.level, grpc.level) == ("warn", "ok")
    assert http.fix == f"make serve SERVE_ARGS=--http-port={taken + 10}"


@pytest.mark.parametrize(
    ("text", "level"),
    [
        ("flags\t\t: avx2 avx512_vnni\n", "ok"), ("flags : avx2 avx_vnni\n", "ok"),
        ("flags : avx2\n", "warn"), ("", "warn"),
    ],
)  # fmt: skip
def test_cpu(tmp_path: Path, text: str, level: str) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    assert doctor.check_cpu(tmp_path / "cpuinfo").level == level


@pytest.mark.parametrize(("level", "status"), [("ok", 0), ("warn", 0), ("error", 1)])
def test_exit_status_and_output(monkeypatch: pytest.MonkeyPatch, level: str, status: int) -> None:
    findings = [Finding("ok", "a", "fine"), Finding(level, "longer", "text", "cure")]
    monkeypatch.setattr(doctor, "examine", lambda *_: findings)
    result = CliRunner().invoke(doctor.main, [])
    assert result.exit_code == status
    assert result.output.splitlines() == [
        "ok     a       fine", f"{level:<5}  longer  text", "               -> cure",
    ]  # fmt: skip
    rows = json.loads(CliRunner().invoke(doctor.main, ["--json"]).output)
    assert rows[1] == {"level": level, "check": "longer", "text": "text", "fix": "cure"}


@pytest.mark.parametrize("size", ["1280", "0x720", "720p"])
def test_bad_size(size: str) -> None:
    result = CliRunner().invoke(doctor.main, ["--size", size])
    assert result.exit_code == 2
    assert "expected WIDTHxHEIGHT such as 1280x720" in result.output
