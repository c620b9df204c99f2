"""What a server leaves on the machine when it is killed: its model instances and their shared memory.

Run as a program, it waits beside one server until that has ended, however it ended, and then cleans up.
"""

from __future__ import annotations

import os
import re
import select
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

SHARED_FOLDER = Path("/dev/shm")
STUB = "triton_python_backend_stub"  # the program that every model instance of the Python backend runs
ENDED_S = 0.3  # seconds without a new instance after which none can be on its way any more
POLL_S = 0.1


def region_prefix(pid: int) -> str:
    """First part of the names of a server's shared memory regions.

    It names the process and its pid namespace, so that another server can tell whether the owner is dead.
    Triton appends a random UUID.
    """
    return f"mst_gan_{pid_namespace()}_{pid}_"


def pid_namespace() -> int:
    """Inode of the pid namespace of this process: in another one, the same pid is another process."""
    return os.stat("/proc/self/ns/pid").st_ino


def regions(prefix: str) -> list[Path]:
    """Shared memory whose name starts so."""
    return sorted(SHARED_FOLDER.glob(f"{prefix}*"))


def remove_leftovers() -> None:
    """Free the shared memory of servers of this pid namespace that have no process any more.

    Whether a server of another namespace is dead cannot be told from here.
    """
    for path in regions("mst_gan_"):
        owner = re.match(r"mst_gan_(\d+)_(\d+)_", path.name)
        if owner and int(owner[1]) == pid_namespace() and not psutil.pid_exists(int(owner[2])):
            path.unlink(missing_ok=True)


def clean(prefix: str, server: int) -> None:
    """End the instances of a server that has ended, and free their shared memory.

    An instance that was at work waits for its dead server forever; one that is idle ends by itself, in 0.3 s.

    Args:
        prefix: Of the server's regions, from ``region_prefix`` or given by the user.
        server: The process id that it had.
    """
    orphaned = set()
    quiet_since = time.monotonic()
    while time.monotonic() - quiet_since < ENDED_S:
        if found := instances(prefix, server):
            quiet_since = time.monotonic()
        for process, region in found:
            orphaned.add(SHARED_FOLDER / region)
            with suppress(psutil.NoSuchProcess):
                process.kill()
        time.sleep(POLL_S)
    if prefix == region_prefix(server):  # else another server may have the same prefix
        orphaned.update(regions(prefix))
    for path in orphaned:
        path.unlink(missing_ok=True)


def instances(prefix: str, server: int) -> list[tuple[psutil.Process, str]]:
    """Processes of a server's model instances, also as bash that is about to run one, and their regions."""
    # Arguments of the stub: model, region, its size and growth, process id of the server, and more.
    pattern = re.compile(rf"{STUB} \S+ ({re.escape(prefix)}\S*) \d+ \d+ {server} ")
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            command = pattern.search(" ".join(process.cmdline()))
            if command and os.stat(f"/proc/{process.pid}/ns/pid").st_ino == pid_namespace():
                found.append((process, command[1]))
    return found


def own_pidfd() -> list[int]:
    """A pidfd of this process; none where Linux is older than 5.3."""
    try:
        return [os.pidfd_open(os.getpid())]
    except OSError:
        return []


def main() -> None:
    """``cleanup.py PREFIX PID SERVER [OWNER]``: the last two are pidfds.

    The server is killed when its owner ends.
    """
    for ignored in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):  # to a whole group; the server ends first
        signal.signal(ignored, signal.SIG_IGN)
    prefix, pid, server, *owner = sys.argv[1], *map(int, sys.argv[2:])
    events = select.poll()
    for pidfd in (server, *owner):
        events.register(pidfd, select.POLLIN)
    while server not in (ended := {pidfd for pidfd, _ in events.poll()}):
        signal.pidfd_send_signal(server, signal.SIGKILL)
        for pidfd in ended:
            events.unregister(pidfd)
    clean(prefix, pid)


if __name__ == "__main__":
    main()
