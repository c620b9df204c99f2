"""What the README tells people to type exists; CI runs its first two commands as they stand."""

import contextlib
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import av
import click
import pytest
import tritonclient.grpc as grpcclient
from requirements import missing
from tritonclient.utils import InferenceServerException

from export.__main__ import main as export
from mst_gan_client import cli as upscale

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "client/README.md", "deploy/README.md", "export/README.md")),
    *sorted(ROOT.glob("export/checkpoints/*.md")),
]

UPSCALE = re.compile(r"client/upscale\.py|mst-gan-upscale")


def commands() -> list[str]:
    """Lines of shell blocks, continued lines joined, comments dropped."""
    found = []
    for document in DOCUMENTS:
        for language, block in re.findall(r"```(\w*)\n(.*?)```", document.read_text(), re.DOTALL):
            if language not in ("", "sh"):
                continue
            lines = block.replace("\\\n", " ").splitlines()
            found += [command for line in lines if (command := line.partition(" #")[0].strip())]
    return found


def targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def parse(command: click.Command, arguments: list[str]) -> None:
    """Let click judge the options, without running anything."""
    if isinstance(command, click.Group):
        command, arguments = command.commands[arguments[0]], arguments[1:]
    command.make_context(command.name, arguments, resilient_parsing=False)


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("make ")])
def test_make_targets(command: str) -> None:
    words = [word for word in shlex.split(command)[1:] if "=" not in word]
    assert set(words) <= targets()


@pytest.mark.parametrize("command", [c for c in commands() if UPSCALE.search(c) or "-m export" in c])
def test_options(command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for names in ("held_back.txt", "validation.txt"):
        (tmp_path / names).touch()
    words = shlex.split(command)
    if "-m" in words:
        parse(export, words[words.index("export") + 1 :])
    else:
        (command,) = (word for word in words if UPSCALE.search(word))
        parse(upscale.main, words[words.index(command) + 1 :])


def test_make_help_lists_the_documented_targets() -> None:
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in ("setup", "export", "serve", "demo", "test"):
        assert re.search(rf"^{target}\s+\S", listed, re.MULTILINE)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
        if not target.startswith("http"):
            assert (document.parent / target).exists(), f"{document.name} links {target}"


def quick_start() -> list[str]:
    """Commands of the README's quick start, as printed, without their comments."""
    section = (ROOT / "README.md").read_text().partition("## Quick start\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    return [
        command
        for block in blocks
        for line in block.splitlines()
        if (command := line.partition(" #")[0].strip())
    ]


@pytest.mark.server
@pytest.mark.timeout(1800)
def test_the_quick_start_as_printed(tmp_path: Path) -> None:
    """Someone who types the quick start in a fresh shell of this checkout gets an upscaled clip."""
    demo, tests, serve, *typed = quick_start()
    assert (demo, tests, serve) == ("make demo", "make test", "make serve")
    # As a login shell has it: nothing of the environment that runs the tests, and `make test` is this run.
    kept = ("HOME", "LANG", "TMPDIR", "XDG_CACHE_HOME", "SSL_CERT_FILE")
    shell = {name: value for name, value in os.environ.items() if name in kept or name.startswith("PIP_")}
    folders = [folder for folder in os.environ["PATH"].split(":") if not folder.startswith(sys.prefix)]
    shell["PATH"] = ":".join(folders)
    if not (ROOT / "build/demo/input.mkv").exists():
        subprocess.run(demo, shell=True, cwd=ROOT, env=shell, check=True)  # noqa: S602 - as a person types it
    with socket.socket() as probe:
        if probe.connect_ex(("localhost", 8001)) == 0:
            missing("PORT", "port 8001, where `make serve` would listen, is in use")
    with (tmp_path / "serve.log").open("w") as log:
        server = subprocess.Popen(
            serve.split(), cwd=ROOT, env=shell, stdout=log, stderr=log, start_new_session=True
        )
    try:
        wait_until_ready(server, "localhost:8001", tmp_path / "serve.log")
        script = "\n".join(["set -e", *typed])
        done = subprocess.run(["bash", "-c", script], cwd=ROOT, env=shell, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=120)
    (out,) = {
        word for line in typed for word in line.split() if word.startswith("build/") and "demo" not in word
    }
    with av.open(ROOT / out) as video, av.open(ROOT / "build/demo/input.mkv") as lr:
        hr_stream, lr_stream = video.streams.video[0], lr.streams.video[0]
        assert (hr_stream.height, hr_stream.width) == (4 * lr_stream.height, 4 * lr_stream.width)
        assert sum(1 for _ in video.decode(video=0)) == sum(1 for _ in lr.decode(video=0))
    (ROOT / out).unlink()


def wait_until_ready(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Return once the ensemble can be asked; the caller's timeout bounds it."""
    with grpcclient.InferenceServerClient(url) as client:
        while True:
            assert server.poll() is None, log.read_text()
            with contextlib.suppress(InferenceServerException):
                if client.is_model_ready("mst_gan"):
                    return
            time.sleep(0.2)
