"""The check at the end of a test session, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import leftovers

LEAVES_ALL = """
import socket, subprocess, tempfile, time
from pathlib import Path
import leftovers
session = leftovers.Session()
print(*session.leftovers())
process = subprocess.Popen(["sleep", "60"])
subprocess.run(["bash", "-c", "sleep 61 &"])  # whose parent is gone
ended = subprocess.Popen(["true"])
ended.wait()
region = Path("/dev/shm", f"mst_gan_1_{ended.pid}_uuid")
region.touch()
file = tempfile.mkstemp()[1]
listener = socket.create_server(("127.0.0.1", 0))
try:
    while not any(line.endswith("sleep 61") for line in session.leftovers()):
        time.sleep(0.01)  # it is still a bash
    print(*session.leftovers(), sep="\\n")
    print(process.pid, region, file, listener.getsockname()[1])
finally:
    region.unlink()
    for line in session.leftovers():
        if line.startswith("process"):
            subprocess.run(["kill", line.split()[1].strip(":")])
"""


def test_what_is_left_is_named(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != leftovers.MARK}
    ended = subprocess.run(
        [sys.executable, "-c", LEAVES_ALL],
        env={**environment, "TMPDIR": str(tmp_path)},
        cwd=Path(leftovers.__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    )
    clean, *left, made = ended.stdout.splitlines()
    pid, region, file, port = made.split()
    assert clean == ""
    assert f"process {pid}: sleep 60" in left
    assert any(line.endswith("sleep 61") for line in left)
    assert {f"shared memory {region}", f"temporary {file}", f"port {port}"} < set(left)
    assert len(left) == 5
