"""Where the project keeps things, and how a file comes there whole."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build"
"""What commands make and can make again; not committed."""


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Where to write what is to become ``path``: it does once all is written; half a file does not stay."""
    partial = path.with_name(f"{path.name}.part")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
