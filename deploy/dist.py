"""``make dist``: wheel, archive of the model repository, bill of materials and checksums."""

from __future__ import annotations

import gzip
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import click
from cyclonedx.model import HashAlgorithm, HashType
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentScope, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from google.protobuf import text_format
from packageurl import PackageURL
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from tritonclient.grpc import model_config_pb2 as pb

from deploy.doctor import REPOSITORY, ROOT, check_repository
from export import spec

PROJECT = "mst-gan-triton"
OLDEST = 315_532_800  # 1980-01-01: zip files know nothing older
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "client")  # what the wheel is made of
SERVER_EXTRA = "server"


class DistError(click.ClickException):
    """Nothing is released: the text says what was expected, what was found and what to do next."""


def release_time(root: Path = ROOT) -> int:
    """Seconds since 1970 that every file gets: ``SOURCE_DATE_EPOCH``, or when the last commit was made."""
    given = os.environ.get("SOURCE_DATE_EPOCH")
    if given is None:
        command = ["git", "-C", str(root), "log", "-1", "--format=%ct"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        given = done.stdout.strip() if done.returncode == 0 else str(OLDEST)
    if not given.isdecimal():
        raise DistError(f"expected seconds in SOURCE_DATE_EPOCH, found {given!r}")
    return max(OLDEST, int(given))


def served_release(repository: Path) -> str:
    """The release that a whole repository publishes."""
    for finding in check_repository(repository):
        if finding.level == "error":
            raise DistError(f"{repository} is not whole: {finding.text}; run `{finding.fix}`")
    config = text_format.Parse(
        (repository / spec.ENSEMBLE.name / "config.pbtxt").read_text(), pb.ModelConfig()
    )
    return str(config.parameters[spec.RELEASE].string_value)


def archive_repository(repository: Path, out: Path, name: str, time_s: int) -> None:
    """Pack a repository below ``name/``: sorted, owned by nobody in particular, every file of one time."""
    with (
        out.open("wb") as file,
        gzip.GzipFile(filename="", mode="wb", fileobj=file, compresslevel=6, mtime=time_s) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for path in [repository, *sorted(repository.rglob("*"))]:
            entry = archive.gettarinfo(path, f"{name}/{path.relative_to(repository)}".removesuffix("/."))
            entry.mtime, entry.uid, entry.gid, entry.uname, entry.gname = time_s, 0, 0, "", ""
            entry.mode = 0o755 if entry.isdir() else 0o644
            if entry.isfile():
                with path.open("rb") as content:
                    archive.addfile(entry, content)
            elif entry.isdir():
                archive.addfile(entry)
            else:
                raise DistError(
                    f"expected files and folders in {repository}, found {path}: replace it by a file"
                )


def build_wheel(out: Path, time_s: int) -> Path:
    """Build the client's wheel from a copy, because setuptools leaves files beside what it builds."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        source.mkdir()
        for name in SOURCES:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / name, source / name)
        command = [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "--wheel-dir",
            folder,
            str(source),
        ]
        environment = {**os.environ, "SOURCE_DATE_EPOCH": str(time_s)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            raise DistError(f"expected a wheel from `{' '.join(command)}`, found: {done.stderr.strip()}")
        return Path(shutil.move(wheels[0], out / wheels[0].name))


def requirements(extra: str = "") -> set[str]:
    """Canonical names of installed packages that the project needs, those they need, and so on."""
    found: set[str] = set()
    pending = [(PROJECT, frozenset([extra]))]
    while pending:
        name, extras = pending.pop()
        for text in metadata.requires(name) or []:
            one = Requirement(text)
            if one.marker and not any(one.marker.evaluate({"extra": chosen}) for chosen in {"", *extras}):
                continue
            required = canonicalize_name(one.name)
            if required not in found and required != PROJECT:
                found.add(required)
                pending.append((required, frozenset(one.extras)))
    return found


def bill_of_materials(files: dict[Path, ComponentType], release: str, time_s: int) -> str:
    """CycloneDX 1.6 as JSON.

    Args:
        files: What is released, or lies in its archive, and what it is.
        release: Of this project.
        time_s: When, in seconds since 1970.

    Returns:
        The client's packages as required, those of the embedded server as optional, in the versions installed
        here, and the files with their SHA-256.
    """
    bom = Bom(serial_number=uuid.uuid5(uuid.NAMESPACE_URL, "".join(sha256(path) for path in files)))
    bom.metadata.timestamp = datetime.fromtimestamp(time_s, UTC)
    bom.metadata.component = Component(
        name=PROJECT, version=release, type=ComponentType.APPLICATION, bom_ref=PROJECT,
        purl=PackageURL("pypi", name=PROJECT, version=release),
    )  # fmt: skip
    needed = requirements()
    for name in sorted(needed | requirements(SERVER_EXTRA)):
        version = metadata.version(name)
        bom.components.add(Component(
            name=name, version=version, type=ComponentType.LIBRARY, bom_ref=f"{name}=={version}",
            purl=PackageURL("pypi", name=name, version=version),
            scope=ComponentScope.REQUIRED if name in needed else ComponentScope.OPTIONAL,
        ))  # fmt: skip
    for path, kind in files.items():
        bom.components.add(Component(
            name="/".join(path.parts[-3:]) if kind is ComponentType.MACHINE_LEARNING_MODEL else path.name,
            version=release, type=kind, bom_ref=sha256(path) + path.name,
            hashes=[HashType(alg=HashAlgorithm.SHA_256, content=sha256(path))],
        ))  # fmt: skip
    bom.register_dependency(bom.metadata.component, bom.components)
    return JsonV1Dot6(bom).output_as_string(indent=2) + "\n"


def sha256(path: Path) -> str:
    """SHA-256 of a file, as ``sha256sum`` prints it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def models(repository: Path) -> Iterator[Path]:
    """ONNX files and plans of a repository."""
    yield from sorted(path for path in repository.glob("*/*/*") if re.search(r"\.(onnx|plan)$", path.name))


@click.command()
@click.option("--repository", type=click.Path(path_type=Path), default=REPOSITORY)
@click.option("--out", type=click.Path(path_type=Path), default=ROOT / "dist")
def main(repository: Path, out: Path) -> None:
    """Fill a new folder OUT/RELEASE with all that a release is made of."""
    release, served, time_s = metadata.version(PROJECT), served_release(repository), release_time()
    if served != release:
        raise DistError(f"expected a repository of release {release}, found {served}: run `make export`")
    done = out / release
    if done.exists():
        raise DistError(f"{done} exists: remove it, or name another folder with --out")
    folder = done.with_name(f"{release}.part")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    name = f"{PROJECT}-models-{release}"
    archive = folder / f"{name}.tar.gz"
    archive_repository(repository, archive, name, time_s)
    wheel = build_wheel(folder, time_s)
    listed = dict.fromkeys((wheel, archive), ComponentType.FILE)
    listed.update(dict.fromkeys(models(repository), ComponentType.MACHINE_LEARNING_MODEL))
    (folder / "sbom.cdx.json").write_text(bill_of_materials(listed, release, time_s))
    files = sorted(folder.iterdir())
    (folder / "SHA256SUMS").write_text("".join(f"{sha256(path)}  {path.name}\n" for path in files))
    folder.rename(done)
    for path in sorted(done.iterdir()):
        click.echo(f"{path.stat().st_size / 1e6:8.1f} MB  {path}")


if __name__ == "__main__":
    main()
