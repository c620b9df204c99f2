"""Nothing but the commands and training itself imports ``export.training``: what serves needs none of it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
ROOMS = "client", "deploy", "export", "perf"
MAY = ROOT / "export" / "__main__.py", ROOT / "export" / "training"


def _imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)


def test_nothing_outside_training_imports_it() -> None:
    files = [path for room in ROOMS for path in (ROOT / room).rglob("*.py")]
    outside = [path for path in files if not any(path.is_relative_to(place) for place in MAY)]
    assert len(outside) > 50  # it did look
    found = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in outside
        for name in _imported(path)
        if name.startswith(("export.training", ".training"))
    ]
    assert not found
