"""Entry point of the command ``mst-gan-upscale``; also ``python client/upscale.py IN OUT`` in a checkout."""

from __future__ import annotations

import importlib.util
import os
import shlex
import signal
import sys
from pathlib import Path

PACKAGE = "mst_gan_client"
EXIT_FAILED = 1
EXIT_STOPPED = 130  # as shells report Ctrl-C


def main() -> None:
    """Import the command and run it.

    Importing takes a moment, in which Ctrl-C ends the process at once, and a missing package is one line
    that says what to run.
    """
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:  # not where a shell has the background ignore Ctrl-C
        signal.signal(signal.SIGINT, lambda *_: os._exit(EXIT_STOPPED))
    try:
        from mst_gan_client.cli import main as command
    except ModuleNotFoundError as err:
        print(_what_to_run(err.name or "a package"), file=sys.stderr)
        sys.exit(EXIT_FAILED)
    signal.signal(signal.SIGINT, handler)
    command()


def _what_to_run(missing: str) -> str:
    """One line for a Python that lacks a package: the command that works in this checkout, or installs."""
    root = Path(__file__).resolve().parent.parent
    python = root / ".venv/bin/python"
    if python.exists():
        remedy = shlex.join([os.path.relpath(python), os.path.relpath(__file__), *sys.argv[1:]])
    else:
        source = (
            shlex.quote(os.path.relpath(root)) if (root / "pyproject.toml").exists() else "mst-gan-triton"
        )
        remedy = f"{shlex.quote(sys.executable)} -m pip install {source}"
    return f"expected the Python package {missing}, found none in {sys.executable}: run {remedy}"


def _import_from_checkout() -> None:
    """Make this folder importable under the package's name, installed or not."""
    folder = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != folder]
    spec = importlib.util.spec_from_file_location(
        PACKAGE, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec and spec.loader
    package = sys.modules[PACKAGE] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)


if __name__ == "__main__":
    _import_from_checkout()
    main()
