"""``make dist``: what is in a release, that it is the same twice, and what is not released."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from deploy import dist
from export import spec

pytestmark = pytest.mark.slow

RELEASE = metadata.version("mst-gan-triton")
TIME_S = 1_700_000_001


@pytest.fixture(autouse=True)
def fixed_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", str(TIME_S))


def run(repository: Path, out: Path) -> Result:
    return CliRunner().invoke(dist.main, ["--repository", str(repository), "--out", str(out)])


def test_a_release(toy_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(toy_repository, tmp_path / "one")
    assert result.exit_code == 0, result.output
    folder = tmp_path / "one" / RELEASE
    wheel, archive = f"mst_gan_triton-{RELEASE}-py3-none-any.whl", f"mst-gan-triton-models-{RELEASE}.tar.gz"
    assert {path.name for path in folder.iterdir()} == {wheel, archive, "sbom.cdx.json", "SHA256SUMS"}
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=folder, check=True)
    assert len((folder / "SHA256SUMS").read_text().splitlines()) == 3

    with tarfile.open(folder / archive) as packed:
        packed.extractall(tmp_path / "unpacked", filter="data")
        names = packed.getnames()
        assert names == sorted(names, key=lambda name: name.split("/"))
        assert {(entry.mtime, entry.uid, entry.gid, entry.uname) for entry in packed} == {(TIME_S, 0, 0, "")}
    unpacked = tmp_path / "unpacked" / f"mst-gan-triton-models-{RELEASE}"
    for path in toy_repository.rglob("*"):
        copy = unpacked / path.relative_to(toy_repository)
        assert copy.is_dir() if path.is_dir() else copy.read_bytes() == path.read_bytes()
    with zipfile.ZipFile(folder / wheel) as zipped:  # its times end in even seconds
        assert {entry.date_time for entry in zipped.infolist()} == {(2023, 11, 14, 22, 13, 20)}

    text = (folder / "sbom.cdx.json").read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    components = {one["name"]: one for one in json.loads(text)["components"]}
    assert components["numpy"]["version"] == metadata.version("numpy")
    assert (components["numpy"]["scope"], components["nvidia-pytriton"]["scope"]) == ("required", "optional")
    assert not {"torch", "pytest", "mst-gan-triton"} & set(components)
    model = toy_repository / "generator/1/model.onnx"
    digest = hashlib.sha256(model.read_bytes()).hexdigest()
    assert components["generator/1/model.onnx"]["hashes"] == [{"alg": "SHA-256", "content": digest}]

    copied = tmp_path / "copied"  # other times, order on disk and rights
    for path in reversed(sorted(toy_repository.rglob("*"))):
        target = copied / path.relative_to(toy_repository)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            shutil.copyfile(path, target)
            target.chmod(0o600)
            os.utime(target, (1, 1))
        else:
            target.mkdir(exist_ok=True)
    monkeypatch.setattr(dist, "build_wheel", lambda out, _: Path(shutil.copy(folder / wheel, out)))
    assert run(copied, tmp_path / "two").exit_code == 0
    for path in folder.iterdir():
        assert (tmp_path / "two" / RELEASE / path.name).read_bytes() == path.read_bytes(), path.name
    again = run(toy_repository, tmp_path / "two")
    assert again.exit_code == 1 and "exists: remove it" in again.output


def test_what_is_not_released(toy_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(toy_repository, copied)
    config = copied / spec.ENSEMBLE.name / "config.pbtxt"
    config.write_text(config.read_text().replace(f'"{RELEASE}"', '"0.0.1"'))
    result = run(copied, tmp_path / "out")
    assert result.exit_code == 1
    assert f"expected a repository of release {RELEASE}, found 0.0.1" in result.output
    (copied / "generator/1/model.onnx").unlink()
    result = run(copied, tmp_path / "out")
    assert result.exit_code == 1 and "is not whole" in result.output and "make export" in result.output
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    result = run(toy_repository, tmp_path / "out")
    assert result.exit_code == 1 and "expected seconds in SOURCE_DATE_EPOCH" in result.output
    assert not (tmp_path / "out").exists()
