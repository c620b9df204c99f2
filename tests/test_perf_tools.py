"""perf_analyzer is found, and when it is not, one line says what to install."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from perf import tools
from perf.errors import PerfError


def put_analyzer(folder: Path, script: str) -> None:
    (folder / "bin").mkdir()
    (folder / "bin/perf_analyzer").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "bin/perf_analyzer").chmod(0o755)


def loader_says(library: str) -> str:
    return f"echo 'perf_analyzer: error while loading shared libraries: {library}: cannot open' >&2; exit 127"


def test_runs_with_the_libraries_beside_it(tmp_path: Path) -> None:
    put_analyzer(tmp_path, 'echo "Perf Analyzer Version 9.8.7 (commit $LD_LIBRARY_PATH)" >&2')

    analyzer = tools.find_analyzer(tmp_path)

    assert analyzer.version == "9.8.7"
    assert analyzer.command(["-m", "x"])[:2] == ["env", f"LD_LIBRARY_PATH={tmp_path / 'lib'}"]


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (None, "found none: run `make perf-tools`"),
        (loader_says("libssl.so.3"), "install the package libssl3"),
        (loader_says("libfoo.so.1"), "install the package that has libfoo.so.1"),
        (loader_says("libb64.so.0d"), "run `make perf-tools` again"),
        ("exit 3", "exit status 3; run `make perf-tools` again"),
    ],
)
def test_missing_or_broken(tmp_path: Path, script: str | None, message: str) -> None:
    if script:
        put_analyzer(tmp_path, script)
    with pytest.raises(PerfError, match=message) as caught:
        tools.find_analyzer(tmp_path)
    assert "\n" not in str(caught.value)


def test_not_executable(tmp_path: Path) -> None:
    put_analyzer(tmp_path, "exit 0")
    (tmp_path / "bin/perf_analyzer").chmod(0o644)
    with pytest.raises(PerfError, match="run `make perf-tools` again"):
        tools.find_analyzer(tmp_path)


def test_the_servers_wheel_has_the_libraries() -> None:
    for name, path in tools.server_libraries().items():
        assert path.is_file()
        assert path.name.startswith(name.split(".")[0])


def test_command_line_prints_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tools, "SERVER", "no-such-package")
    monkeypatch.setattr(tools.find_analyzer, "__defaults__", (tmp_path,))

    result = CliRunner().invoke(tools.main)

    assert result.exit_code == 1
    assert result.output == "Error: expected the package no-such-package, found none: run `make setup`\n"
