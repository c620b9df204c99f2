"""What the README tells people to type exists; CI runs its first two commands as they stand."""

import re
import shlex
import subprocess
from pathlib import Path

import click
import pytest

from export.__main__ import main as export
from mst_gan_client import cli as upscale

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "client/README.md", "deploy/README.md", "export/README.md")),
    *sorted(ROOT.glob("export/checkpoints/*.md")),
]


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


@pytest.mark.parametrize("command", [c for c in commands() if "client/upscale.py" in c or "-m export" in c])
def test_options(command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "held_back.txt").touch()
    words = shlex.split(command)
    if "-m" in words:
        parse(export, words[words.index("export") + 1 :])
    else:
        parse(upscale.main, words[words.index("client/upscale.py") + 1 :])


def test_make_help_lists_the_documented_targets() -> None:
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in ("setup", "export", "serve", "demo", "test"):
        assert re.search(rf"^{target}\s+\S", listed, re.MULTILINE)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
        if not target.startswith("http"):
            assert (document.parent / target).exists(), f"{document.name} links {target}"


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
