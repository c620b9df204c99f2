"""Fails a test session that leaves processes, shared memory, temporary files or open ports behind."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

MARK = "MST_GAN_TEST_SESSION"
"""Environment variable that every process of this session inherits, also one whose parent is gone."""
PATIENCE_S = 10  # a server's clean-up process ends a moment after its server
OWNED_REGION = re.compile(r"(?:mst_gan_\d+_|vsr-upscale-\w+-)(\d+)[-_]")  # the owner's process id
OTHERS_FILES = (".ses", "torchinductor_")  # ONNX Runtime's session number, PyTorch's cache when it counts
SHARED_FOLDER = Path("/dev/shm")


class Session:
    """What was there before the first test, and a folder for everything temporary."""

    def __init__(self) -> None:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())  # pytest keeps its own folders
        self.token = os.environ.setdefault(MARK, secrets.token_hex(8))
        self.regions = set(regions())
        self.temporary = Path(tempfile.mkdtemp(prefix="mst-gan-tests-"))
        os.environ["TMPDIR"] = tempfile.tempdir = str(self.temporary)

    def leftovers(self) -> Iterator[str]:
        """One line for each thing that is left."""
        me = psutil.Process()
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get(MARK) == self.token and process.pid != me.pid:
                    yield f"process {process.pid}: {' '.join(process.cmdline())}"
        for connection in me.net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN:
                yield f"port {connection.laddr.port}"
        yield from (f"shared memory {path}" for path in regions() if path not in self.regions)
        yield from (
            f"temporary {path}" for path in self.temporary.iterdir() if not path.name.startswith(OTHERS_FILES)
        )

    def close(self) -> list[str]:
        """What is left in the end, removed if it is a file."""
        deadline = time.monotonic() + PATIENCE_S
        while (left := list(self.leftovers())) and time.monotonic() < deadline:
            time.sleep(0.2)
        shutil.rmtree(self.temporary, ignore_errors=True)
        return left


def regions() -> list[Path]:
    """Shared memory of this project's servers and clients, but for living processes of other sessions."""
    owners = {path: OWNED_REGION.match(path.name) for path in SHARED_FOLDER.iterdir()}
    return [path for path, owner in owners.items() if owner and not is_of_others(int(owner[1]))]


def is_of_others(pid: int) -> bool:
    """Whether this is a living process of another session."""
    try:
        return psutil.Process(pid).environ().get(MARK) != os.environ.get(MARK)
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True


@pytest.fixture(autouse=True)
def _scheduling_stays() -> Iterator[None]:
    """A test that makes this process real-time, as SVT-AV1 does for root, would disturb all after it."""
    if not hasattr(os, "sched_getscheduler"):  # not Linux
        yield
        return
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    yield
    changed = False
    for thread in os.listdir("/proc/self/task"):
        with suppress(OSError):  # it has ended
            if os.sched_getscheduler(int(thread)) != policy:
                os.sched_setscheduler(int(thread), policy, parameters)
                changed = True
    assert not changed, "the scheduling of this process's threads changed, see same_scheduling"


SESSION = pytest.StashKey[Session]()


def pytest_configure(config: pytest.Config) -> None:
    """Before any test."""
    if not hasattr(config, "workerinput"):  # a worker of pytest-xdist shares its parent's session
        config.stash[SESSION] = Session()


@pytest.hookimpl(trylast=True)  # after the fixtures of the session
def pytest_sessionfinish(session: pytest.Session) -> None:
    """After all tests."""
    if SESSION not in session.config.stash:
        return
    left = session.config.stash[SESSION].close()
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if left and reporter:
        reporter.section("left behind by the tests", red=True)
        for line in left:
            reporter.line(line)
    if left:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
