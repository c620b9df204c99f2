"""What becomes of a server's instances and shared memory, however it ends, and of the servers beside it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tritonclient.grpc as grpcclient
from toy_models import build_busy_repository
from tritonclient.utils import InferenceServerException

from deploy.embedded import cleanup
from deploy.embedded.server import TritonServer

pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]

LONG = 10_000_000  # rounds of the busy model: minutes of work
PATIENCE_S = 60  # for a machine that does a lot beside


@pytest.fixture(scope="module")
def busy_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model, one instance: starts quickly, and can be kept at work."""
    models = tmp_path_factory.mktemp("busy") / "model_repository"
    build_busy_repository(models)
    return models


class Busy:
    """A server with the busy model."""

    def __init__(self, server: TritonServer, stack: ExitStack) -> None:
        self.server = server
        self.pid = server.process.pid
        self._client = stack.enter_context(grpcclient.InferenceServerClient(server.grpc_url))
        self._pool = stack.enter_context(ThreadPoolExecutor(4))
        self.prefix = cleanup.region_prefix(self.pid)

    def ask(self, rounds: int) -> Future[Any]:
        """Work for so many rounds, which are the answer."""

        def answer() -> Any:
            lr = grpcclient.InferInput("rounds", [1], "INT64")
            lr.set_data_from_numpy(np.array([rounds]))
            try:
                return int(self._client.infer("busy", [lr]).as_numpy("done").item())
            except InferenceServerException as err:
                return err

        return self._pool.submit(answer)

    def instance(self) -> psutil.Process:
        """The process of its one instance."""
        ((process, _),) = cleanup.instances(self.prefix, self.pid)
        return process

    def ask_and_see_it_at_work(self, rounds: int) -> Future[Any]:
        """Ask, and return when the instance computes."""
        instance = self.instance()
        before = instance.cpu_times().user
        answer = self.ask(rounds)
        wait_until(lambda: instance.cpu_times().user > before + 0.3)
        return answer

    def is_gone(self) -> bool:
        """Whether nothing is left of it."""
        return not cleanup.instances(self.prefix, self.pid) and not cleanup.regions(self.prefix)


@pytest.fixture(scope="module")
def neighbor(busy_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Busy]:
    """A server beside those that are killed."""
    with serving(busy_repository, tmp_path_factory.mktemp("neighbor") / "triton.log") as busy:
        yield busy


@pytest.fixture(autouse=True)
def undisturbed(request: pytest.FixtureRequest) -> Iterator[None]:
    """Have the neighbor, where a test has one, answer through all of it, and rightly."""
    if "neighbor" not in request.fixturenames:
        yield
        return
    busy: Busy = request.getfixturevalue("neighbor")
    ended = threading.Event()

    def keep_asking() -> int:
        rounds = 1
        while not ended.wait(0.01):
            assert busy.ask(rounds).result() == rounds
            rounds += 1
        return rounds

    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(keep_asking)
        try:
            yield
        finally:
            ended.set()
        assert asked.result() > 1
    assert busy.server.process.poll() is None
    assert len(cleanup.regions(busy.prefix)) == 1


@contextmanager
def serving(models: Path, log_file: Path) -> Iterator[Busy]:
    """A server that has ended or been stopped afterwards."""
    with TritonServer(models, log_file) as server, ExitStack() as stack:
        yield Busy(server, stack)
        server.process.kill()  # no wait for requests at work


def wait_until(condition: Callable[[], object]) -> None:
    """Return when it is so; fail after a while."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.usefixtures("neighbor")
def test_a_server_that_is_killed_at_work_leaves_nothing(busy_repository: Path, tmp_path: Path) -> None:
    """Triton's own instances would wait for it forever."""
    with serving(busy_repository, tmp_path / "log") as busy:
        answer = busy.ask_and_see_it_at_work(LONG)
        assert len(cleanup.regions(busy.prefix)) == 1

        busy.server.process.kill()

        assert isinstance(answer.result(), InferenceServerException)
        wait_until(busy.is_gone)


def test_a_port_that_somebody_else_takes_meanwhile_is_given_up(
    busy_repository: Path, tmp_path: Path, neighbor: Busy
) -> None:
    server = TritonServer(busy_repository, tmp_path / "log")
    theirs = neighbor.server.http_url
    ours_port, their_port = (url.partition(":")[2] for url in (server.http_url, theirs))
    server.command = [part.replace(ours_port, their_port) for part in server.command]
    server.http_url = theirs
    with server:
        assert server.http_url != theirs
        assert server.process.pid != neighbor.pid
        assert server.ready()


OWNER = """
import sys, time
from pathlib import Path
from deploy.embedded.server import TritonServer
with TritonServer(Path(sys.argv[1]), Path(sys.argv[2])) as server:
    print(server.process.pid, server.grpc_url, flush=True)
    time.sleep(1000)
"""


@pytest.mark.usefixtures("neighbor")
def test_a_server_does_not_outlive_the_process_that_started_it(busy_repository: Path, tmp_path: Path) -> None:
    with (
        subprocess.Popen(
            [sys.executable, "-c", OWNER, busy_repository, tmp_path / "log"],
            stdout=subprocess.PIPE, text=True,
        ) as owner,
    ):  # fmt: skip
        try:
            assert owner.stdout is not None
            pid, url = owner.stdout.readline().split()
            prefix = cleanup.region_prefix(int(pid))
            with grpcclient.InferenceServerClient(url) as client:
                assert client.is_server_ready()
            assert cleanup.instances(prefix, int(pid))
        finally:
            owner.kill()

    wait_until(lambda: not psutil.pid_exists(int(pid)))
    wait_until(lambda: not cleanup.instances(prefix, int(pid)) and not cleanup.regions(prefix))


@pytest.mark.usefixtures("neighbor")
def test_an_instance_that_triton_gave_up_on_gives_no_answer(busy_repository: Path, tmp_path: Path) -> None:
    """Triton would take its late answer for the one to the next request, and then crash."""
    with serving(busy_repository, tmp_path / "log") as busy:
        instance = busy.instance()
        abandoned = busy.ask_and_see_it_at_work(100_000)
        instance.suspend()
        try:
            refusal = abandoned.result(PATIENCE_S)  # Triton waits for a second or two
        finally:
            instance.resume()
        answers = [busy.ask(rounds) for rounds in (1, 2, 3)]
        status = busy.server.process.wait(PATIENCE_S)

        assert "is not healthy" in str(refusal)
        assert all(isinstance(answer.result(), InferenceServerException) for answer in answers)
        assert status == -signal.SIGKILL
        assert "busy: this instance stalled for over a second" in busy.server.log_tail()
        wait_until(busy.is_gone)


@pytest.fixture
def shared_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cleanup, "SHARED_FOLDER", tmp_path)
    return tmp_path


def dead_pid() -> int:
    with subprocess.Popen(["true"]) as process:
        return process.pid


def test_only_what_certainly_is_a_dead_servers_is_freed(shared_folder: Path) -> None:
    here = cleanup.pid_namespace()
    dead = shared_folder / f"mst_gan_{here}_{dead_pid()}_some-uuid"
    others = [
        shared_folder / name
        for name in (
            f"mst_gan_{here}_{os.getpid()}_some-uuid",
            f"mst_gan_{here}_1_some-uuid",
            f"mst_gan_{here + 1}_{dead_pid()}_some-uuid",  # its process may live in another container
            f"mst_gan_{dead_pid()}_some-uuid",
            "triton_python_backend_shm_region_some-uuid",
        )
    ]
    for path in (dead, *others):
        path.touch()

    cleanup.remove_leftovers()

    assert set(shared_folder.iterdir()) == set(others)


IN_A_CONTAINER = """
import sys
from pathlib import Path
from deploy.embedded import cleanup
cleanup.SHARED_FOLDER = Path(sys.argv[1])
cleanup.remove_leftovers()
import os
(cleanup.SHARED_FOLDER / f"{cleanup.region_prefix(os.getpid())}uuid").touch()
print(os.getpid(), flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(
    subprocess.run(
        ["unshare", "--pid", "--fork", "--mount-proc", "true"], stderr=subprocess.DEVNULL
    ).returncode != 0,
    reason="needs the right to make a pid namespace (root)",
)  # fmt: skip
def test_servers_of_other_pid_namespaces_are_left_alone(shared_folder: Path) -> None:
    """Both ways: to each, the other's process id is that of no process, or of another."""
    ours = shared_folder / f"{cleanup.region_prefix(os.getpid())}uuid"
    ours.touch()
    with subprocess.Popen(
        ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", IN_A_CONTAINER, shared_folder],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as container:  # fmt: skip
        assert container.stdout is not None and container.stdin is not None
        assert container.stdout.readline() == "1\n"
        cleanup.remove_leftovers()
        left = set(shared_folder.iterdir())
        container.stdin.close()

    assert ours in left
    assert len(left) == 2


def test_a_prefix_of_the_users_own_frees_only_what_instances_name(shared_folder: Path) -> None:
    """Another server may have the same prefix."""
    ours, theirs = shared_folder / "mine_1", shared_folder / "mine_2"
    for path in (ours, theirs):
        path.touch()
    server = dead_pid()
    # A process with the arguments of an instance.
    stub = [cleanup.STUB, "model.py", "mine_1", "1048576", "1048576", str(server), "lib", "1", "name"]
    with subprocess.Popen(["bash", "-c", "read", *stub], stdin=subprocess.PIPE) as instance:
        cleanup.clean("mine_", server + 1)
        assert instance.poll() is None
        cleanup.clean("mine_", server)
        assert instance.wait() == -signal.SIGKILL

    assert list(shared_folder.iterdir()) == [theirs]
