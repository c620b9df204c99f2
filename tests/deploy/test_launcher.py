"""The ``tritonserver`` command up to the moment it becomes Triton: its command line, its one-line errors."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from deploy.embedded import cleanup, launcher
from export import spec

TRITONSERVER = Path(sys.executable).with_name("tritonserver")
SETTING = "--backend-config=python,shm-region-prefix-name="
PREFIX = f"{SETTING}mst_gan_{cleanup.pid_namespace()}_{os.getpid()}_"
Launch = Callable[..., tuple[list[str], dict[str, str]]]


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Launch:
    """Runs the command with arguments and returns the command line and environment it would become."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in launcher.MALLOC:
        monkeypatch.delenv(name, raising=False)

    monkeypatch.setattr(launcher, "start_cleanup", lambda prefix: None)

    def run(*arguments: str) -> tuple[list[str], dict[str, str]]:
        became: list[tuple[list[str], dict[str, str]]] = []
        monkeypatch.setattr(sys, "argv", ["tritonserver", *arguments])
        monkeypatch.setattr(os, "execve", lambda path, command, env: became.append((command, env)))
        launcher.main()
        command, environment = became[0]
        if PREFIX in command:
            command.remove(PREFIX)
        return command, environment

    return run


def test_arguments_pass_through_unchanged_behind_the_defaults(launch: Launch, toy_repository: Path) -> None:
    arguments = [f"--model-repository={toy_repository}", "--log-verbose", "1", "--id=x y"]

    command, _ = launch(*arguments)

    assert command[0].endswith("pytriton/tritonserver/bin/tritonserver")
    assert command[1].startswith("--backend-directory=")
    assert command[2:4] == ["--http-address=127.0.0.1", "--grpc-address=127.0.0.1"]
    assert command[4:] == arguments


@pytest.mark.parametrize("given", [["--http-address=0.0.0.0"], ["--http-address", "0.0.0.0"]])
def test_an_address_given_replaces_the_default(launch: Launch, given: list[str]) -> None:
    command, _ = launch(*given)

    assert command[2:] == ["--grpc-address=127.0.0.1", *given]


def test_backends_are_complete_and_the_stub_is_this_pythons(launch: Launch) -> None:
    command, environment = launch("--help")

    backends = Path(command[1].partition("=")[2])
    assert (backends / "onnxruntime/model.py").read_text() == launcher.SHIM.read_text()
    assert (backends / "python/libtriton_python.so").is_file()
    assert os.access(backends / "python/triton_python_backend_stub", os.X_OK)
    assert environment["PATH"].split(":")[0] == str(Path(sys.executable).parent)
    assert any(
        (Path(folder) / launcher.LIBPYTHON).exists() for folder in environment["LD_LIBRARY_PATH"].split(":")
    )
    assert environment.items() >= {name: str(size) for name, size in launcher.MALLOC.items()}.items()


def test_how_memory_is_kept_can_be_set(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "4096")
    assert launch("--help")[1]["MALLOC_TRIM_THRESHOLD_"] == "4096"


def test_the_printed_command_can_be_pasted(
    launch: Launch, toy_repository: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")

    launch(f"--model-repository={toy_repository}", "--id=x y")

    (line,) = caplog.messages
    ended = subprocess.run(["bash", "-c", f"{line} --help"], capture_output=True, text=True, timeout=30)
    assert "Usage: tritonserver" in ended.stderr


def test_servers_that_start_together_share_one_complete_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    wheel = launcher.find_wheel()

    with ThreadPoolExecutor(8) as pool:
        (folder,) = set(pool.map(launcher.copy_backends, [wheel] * 8))

    assert sorted(path.name for path in folder.glob("*/*")) == [
        "libtriton_python.so",
        "model.py",
        "sequences.py",
        "triton_python_backend_stub",
        "triton_python_backend_utils.py",
    ]


@pytest.mark.parametrize("given", [[f"{SETTING}mine_"], [*f"{SETTING}mine_".split("=", 1)]])
def test_a_prefix_of_the_users_own_stays(
    launch: Launch, monkeypatch: pytest.MonkeyPatch, given: list[str]
) -> None:
    prefixes: list[str] = []
    monkeypatch.setattr(launcher, "start_cleanup", prefixes.append)

    command, _ = launch(*given)

    assert command[-len(given) :] == given
    assert prefixes == ["mine_"]
    assert sum("shm-region-prefix-name" in argument for argument in command) == 1


def test_memory_of_dead_servers_is_freed_at_the_start(
    launch: Launch, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cleanup, "SHARED_FOLDER", tmp_path)
    with subprocess.Popen(["true"]) as ended:
        region = tmp_path / f"{cleanup.region_prefix(ended.pid)}uuid"
    region.touch()

    launch("--help")

    assert not region.exists()


def little_shared_memory(monkeypatch: pytest.MonkeyPatch, models: Path) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=5 << 20))


def no_shared_memory(monkeypatch: pytest.MonkeyPatch, models: Path) -> None:
    monkeypatch.setattr(cleanup, "SHARED_FOLDER", models / "none")


def numpy_2(monkeypatch: pytest.MonkeyPatch, models: Path) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: "2.1.3")


def no_wheel(monkeypatch: pytest.MonkeyPatch, models: Path) -> None:
    monkeypatch.setattr("deploy.embedded.launcher.util.find_spec", lambda name: None)


def old_glibc(monkeypatch: pytest.MonkeyPatch, models: Path) -> None:
    monkeypatch.setattr("platform.libc_ver", lambda: ("glibc", "2.31"))


def musl(monkeypatch: pytest.MonkeyPatch, models: Path) -> None:
    monkeypatch.setattr("platform.libc_ver", lambda: ("", ""))


def new_python(monkeypatch: pytest.MonkeyPatch, models: Path) -> None:
    monkeypatch.setattr(launcher, "PYTHON", "3.99")


def static_python(monkeypatch: pytest.MonkeyPatch, models: Path) -> None:
    monkeypatch.setattr(launcher, "LIBPYTHON", "libpython3.11-none.so")


def unwritable_cache(monkeypatch: pytest.MonkeyPatch, models: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")


def cache_with_space(monkeypatch: pytest.MonkeyPatch, models: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", f"{models}/my cache")


def no_repository(monkeypatch: pytest.MonkeyPatch, models: Path) -> None:
    shutil.rmtree(models)


def no_onnx(monkeypatch: pytest.MonkeyPatch, models: Path) -> None:
    (models / spec.GENERATOR.name / "1/model.onnx").unlink()


@pytest.mark.parametrize(
    ("cause", "message"),
    [
        (
            numpy_2,
            "expected numpy < 2, found 2.1.3: under numpy 2 the server's Python stub returns empty tensors",
        ),
        (no_wheel, "nvidia-pytriton is not installed in this Python: run `make setup`"),
        (old_glibc, "expected Linux with glibc >= 2.35, found linux with glibc 2.31"),
        (musl, "expected Linux with glibc >= 2.35, found linux with another C library"),
        (new_python, "expected Python 3.8, 3.9, 3.10, 3.11, 3.12, 3.13, found 3.99"),
        (static_python, "apt-get install libpython3"),
        (unwritable_cache, "expected a writable cache folder"),
        (cache_with_space, "without spaces or quotes in its path"),
        (little_shared_memory, "expected at least 7 MB free in /dev/shm for 7 model instances, found 5 MB"),
        (no_shared_memory, "found no such folder: mount -t tmpfs tmpfs"),
        (no_repository, "expected a model repository at"),
        (no_onnx, "generator/1/model.onnx is missing: run `make export`"),
    ],
)
def test_what_is_missing_is_said_in_one_line(
    launch: Launch,
    monkeypatch: pytest.MonkeyPatch,
    toy_repository: Path,
    tmp_path: Path,
    cause: Callable[[pytest.MonkeyPatch, Path], None],
    message: str,
) -> None:
    models = tmp_path / "model_repository"
    shutil.copytree(toy_repository, models)
    cause(monkeypatch, models)

    with pytest.raises(SystemExit) as ended:
        launch(f"--model-repository={models}")

    assert message in str(ended.value)
    assert "\n" not in str(ended.value)


def test_the_file_of_the_chosen_configuration_is_what_counts(
    launch: Launch, toy_repository: Path, tmp_path: Path
) -> None:
    models = tmp_path / "model_repository"
    shutil.copytree(toy_repository, models)
    launch(f"--model-repository={models}")

    with pytest.raises(SystemExit, match=r"model\.fp16\.onnx is missing: run `make export TARGET=cuda`"):
        launch(f"--model-repository={models}", "--model-config-name=cuda")


def test_models_may_come_later_under_explicit_control(
    launch: Launch, toy_repository: Path, tmp_path: Path
) -> None:
    models = tmp_path / "model_repository"
    shutil.copytree(toy_repository, models)
    (models / spec.GENERATOR.name / "1/model.onnx").unlink()

    command, _ = launch(f"--model-repository={models}", "--model-control-mode=explicit")

    assert command[-1] == "--model-control-mode=explicit"


def test_an_error_is_one_line_on_stderr_and_status_1() -> None:
    ended = subprocess.run(
        [TRITONSERVER, "--model-repository=/none"], capture_output=True, text=True, timeout=30
    )

    assert ended.returncode == 1
    assert ended.stderr == "tritonserver: expected a model repository at /none, found no such folder\n"
    assert ended.stdout == ""


@pytest.mark.skipif(
    subprocess.run(["unshare", "--mount", "true"], stderr=subprocess.DEVNULL).returncode != 0,
    reason="needs the right to mount (root)",
)
def test_a_shared_memory_that_is_nearly_full_is_said_in_one_line(toy_repository: Path) -> None:
    script = 'mount -t tmpfs -o size=4m tmpfs /dev/shm; exec "$@"'
    command = ["unshare", "--mount", "bash", "-c", script, "bash"]
    ended = subprocess.run(
        [*command, TRITONSERVER, f"--model-repository={toy_repository}"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip

    assert ended.returncode == 1
    assert re.fullmatch(
        r"tritonserver: expected at least 7 MB free in /dev/shm .* found 4 MB: .*\n", ended.stderr
    )


def test_help_is_tritons_own() -> None:
    ended = subprocess.run([TRITONSERVER, "--help"], capture_output=True, text=True, timeout=30)

    assert "--model-config-name" in ended.stderr
