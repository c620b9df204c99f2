"""``make perf-tools``: a perf_analyzer that runs here, without root, beside the server it measures.

PyPI's own perf-analyzer needs glibc 2.38. The binary that once came with Triton's client runs from 2.35 on,
as the embedded server does, and the two libraries it lacks on most machines lie in that server's wheel.
"""

from __future__ import annotations

import logging
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import click

from perf.errors import Command, PerfError

FOLDER = Path(sys.prefix) / "perf_analyzer"
REQUIREMENT = "tritonclient==2.51.0"  # the Triton of nvidia-pytriton 0.7.0
PLATFORM = "manylinux1_x86_64"  # the wheel for any platform has no binary
BINARY = "tritonclient-2.51.0.data/data/bin/perf_analyzer"
SERVER = "nvidia-pytriton"
LIBRARIES = ("libb64.so.0d", "libcudart.so.12")
# What Debian and Ubuntu call the packages of the other libraries that the binary asks for.
PACKAGES = {"libssl.so.3": "libssl3", "libcrypto.so.3": "libssl3", "libz.so.1": "zlib1g"}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Analyzer:
    """A perf_analyzer that answered."""

    path: Path
    library_path: Path
    version: str

    def command(self, arguments: list[str]) -> list[str]:
        """The whole command line, to be run or pasted into a shell."""
        return ["env", f"LD_LIBRARY_PATH={self.library_path}", str(self.path), *arguments]


def find_analyzer(folder: Path = FOLDER) -> Analyzer:
    """The installed perf_analyzer.

    Raises:
        PerfError: There is none, or it does not run.
    """
    path, libraries = folder / "bin/perf_analyzer", folder / "lib"
    if not path.is_file():
        raise PerfError(
            f"expected perf_analyzer (of {REQUIREMENT}) at {path}, found none: run `make perf-tools`"
        )
    analyzer = Analyzer(path, libraries, "")
    try:
        run = subprocess.run(analyzer.command(["--version"]), capture_output=True, text=True)
    except OSError as err:
        raise PerfError(f"{path} does not start ({err}): run `make perf-tools` again") from err
    if run.returncode:
        missing = re.search(r"libraries: ([\w.+-]+):", run.stderr)
        if missing and missing[1] not in LIBRARIES:
            advice = f"install the package {PACKAGES.get(missing[1], f'that has {missing[1]}')}"
        else:
            advice = "run `make perf-tools` again"
        reason = run.stderr.strip().partition("\n")[0] or f"exit status {run.returncode}"
        raise PerfError(f"expected {path} to run, found: {reason}; {advice}")
    version = re.search(r"Version (\S+)", run.stdout + run.stderr)
    return Analyzer(path, libraries, version[1] if version else "unknown")


def install(folder: Path = FOLDER) -> None:
    """Put perf_analyzer and links to its libraries into the folder.

    Raises:
        PerfError: The server's wheel is not installed, or pip cannot get the binary.
    """
    bundled = server_libraries()
    with tempfile.TemporaryDirectory() as temporary:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += [f"--platform={PLATFORM}", f"--dest={temporary}", REQUIREMENT]
        run = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(temporary).glob("*.whl"))
        if run.returncode or not wheels:
            reason = (run.stderr.strip().splitlines() or ["no wheel"])[-1]
            raise PerfError(
                f"pip cannot get {REQUIREMENT} for {PLATFORM} ({reason}): check the package index"
            )
        binary = folder / "bin/perf_analyzer"
        binary.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(BINARY) as source:
            part = binary.with_name("perf_analyzer.part")
            with part.open("wb") as target:
                shutil.copyfileobj(source, target)
            part.chmod(0o755)
            part.replace(binary)
    (folder / "lib").mkdir(exist_ok=True)
    for name, library in bundled.items():
        link = folder / "lib" / name
        link.unlink(missing_ok=True)
        link.symlink_to(library)


def server_libraries() -> dict[str, Path]:
    """Library name -> its file in the server's wheel, where auditwheel put a hash into the name."""
    try:
        files = distribution(SERVER).files or []
    except PackageNotFoundError as err:
        raise PerfError(f"expected the package {SERVER}, found none: run `make setup`") from err
    found = {}
    for name in LIBRARIES:
        stem, version = name.split(".so.")
        pattern = re.compile(rf"{stem}-\w+\.so\.{re.escape(version)}(\.|$)")
        matches = [file for file in files if pattern.match(file.name)]
        if not matches:
            raise PerfError(f"expected {name} in {SERVER}, found none: install {SERVER}==0.7.0")
        found[name] = Path(str(matches[0].locate())).resolve()
    return found


@click.command(cls=Command)
def main() -> None:
    """Install perf_analyzer into this environment, unless it is there."""
    try:
        analyzer = find_analyzer()
    except PerfError:
        install()
        analyzer = find_analyzer()
    log.info("perf_analyzer %s: %s", analyzer.version, analyzer.path)


if __name__ == "__main__":
    main()
