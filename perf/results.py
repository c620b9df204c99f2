"""Results files: one schema, written whole or not at all, refused when they are another's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from perf.errors import PerfError

SCHEMA = "mst-gan-perf/1"
KINDS = ("sweep", "overhead", "peers", "ladder", "gpu")
FOLDER = Path(__file__).parent / "results"
REQUIRED = ("kind", "name", "machine")

Result = dict[str, Any]


def write(folder: Path, result: Mapping[str, Any]) -> Path:
    """Write ``<folder>/<name>.json`` and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result['name']}.json"
    part = path.with_suffix(".json.part")
    part.write_text(json.dumps({"schema": SCHEMA, **result}, indent=1) + "\n")
    part.replace(path)
    return path


def load(path: Path) -> Result:
    """Read one results file.

    Raises:
        PerfError: It is unreadable or of another schema.
    """
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError) as err:
        raise PerfError(f"expected {path} to hold results, found: {err}; measure again") from err
    found = result.get("schema") if isinstance(result, dict) else None
    if found != SCHEMA:
        raise PerfError(
            f"expected schema {SCHEMA} in {path}, found {found!r}: measure again or remove the file"
        )
    missing = [key for key in REQUIRED if key not in result]
    if missing or result["kind"] not in KINDS:
        raise PerfError(
            f"expected {path} to say {', '.join(REQUIRED)}, found {', '.join(result)}: measure again"
        )
    return dict(result)


def load_folder(folder: Path) -> dict[str, Result]:
    """Name -> result of every file in a folder.

    Raises:
        PerfError: There is none, or one is not readable.
    """
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise PerfError(f"expected results in {folder}, found none: run `make sweep` first")
    return {result["name"]: result for result in map(load, paths)}
