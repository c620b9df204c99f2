"""Ctrl-C while the command is still importing: it ends at once, and says nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMAND = "import sys; from mst_gan_client.upscale import main; sys.exit(main())"  # as pip's scripts have it
WAYS = {
    "the script": [str(ROOT / "client" / "upscale.py")],
    "the module": ["-m", "mst_gan_client"],
    "the command": ["-c", COMMAND],
}


@pytest.mark.parametrize("package", ["click", "av", "numpy", "tritonclient"])
@pytest.mark.parametrize("way", WAYS)
def test_ctrl_c_while_importing(tmp_path, way, package):
    """A package that takes its time to import stands in for a slow disk."""
    slow = tmp_path / "slow" / package
    slow.mkdir(parents=True)
    marker = tmp_path / "importing"
    (slow / "__init__.py").write_text(
        f"import pathlib, time\npathlib.Path({str(marker)!r}).touch()\ntime.sleep(120)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(slow.parent)}
    command = [sys.executable, *WAYS[way], "in.mp4", "out.mp4"]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not marker.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 130
