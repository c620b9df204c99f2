"""The ``tritonserver`` command: check what the embedded server needs, then become it.

PyPI's nvidia-pytriton carries NVIDIA's Triton with the Python backend and no other. Beside it we put our own
``onnxruntime`` backend, written for the Python backend, so that the repository needs no second config.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from importlib import metadata, util
from itertools import pairwise
from pathlib import Path

if not __package__:  # run as a file, by the ``tritonserver`` command
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from deploy.embedded import cleanup

MIN_GLIBC = (2, 35)  # what the wheel's libtritonserver is linked against
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
LIBPYTHON = f"libpython{PYTHON}.so.1.0"
STUBS = "python_backend_stubs"
SHIM = Path(__file__).with_name("onnxruntime_backend") / "model.py"
LOOPBACK = ("--http-address", "--grpc-address")  # metrics listen where HTTP does, unless told otherwise
MALLOC = {"MALLOC_MMAP_THRESHOLD_": 32 << 20, "MALLOC_TRIM_THRESHOLD_": 256 << 20}
"""Bytes, for glibc. By default it hands a frame's buffers back to the kernel and has them zeroed again for
the next: at 320x180 2 to 3 ms of a core for each frame, of the 45 that all stages take with the student."""

REGION_BYTES = 1 << 20
"""Shared memory of one model instance at first. It grows to what its batches need: with batches of 4 at
1280x720 all six together take at most 1.7 GB. Where /dev/shm is smaller, Triton answers the request with an
error that says so."""
PREFIX_SETTING = "python,shm-region-prefix-name="
OWNER_VARIABLE = "TRITONSERVER_OWNER_PIDFD"
"""Environment variable with an inherited pidfd: the server is killed when that process ends."""

log = logging.getLogger("tritonserver")


class LaunchError(Exception):
    """The server cannot start: the text says what was expected, what was found and what to do next."""


def main() -> None:
    """Replace this process by Triton, so that signals and the exit status are Triton's own."""
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    arguments = sys.argv[1:]
    try:
        wheel = find_wheel()
        check_packages()
        instances = check_repositories(arguments)
        prefix = given_prefix(arguments)
        if prefix is None:
            cleanup.remove_leftovers()
        check_shared_memory(instances)
        command = [
            str(wheel / "tritonserver/bin/tritonserver"),
            f"--backend-directory={copy_backends(wheel)}",
            *(f"{flag}=127.0.0.1" for flag in LOOPBACK if not flag_values(arguments, flag)),
            *arguments,  # last: of a flag given twice, Triton takes the later one
        ]
        # The Python backend runs the `python3` of PATH inside the libpython of LD_LIBRARY_PATH.
        environment = {
            "PATH": prepend("PATH", Path(sys.executable).parent),
            "LD_LIBRARY_PATH": prepend(
                "LD_LIBRARY_PATH", wheel.parent / "nvidia_pytriton.libs", find_libpython()
            ),
            **{name: os.environ.get(name, str(size)) for name, size in MALLOC.items()},
        }
    except LaunchError as err:
        sys.exit(f"tritonserver: {err}")
    assignments = shlex.join(["env", *(f"{name}={value}" for name, value in environment.items())])
    log.info("%s %s", assignments, shlex.join(command))
    if prefix is None:
        # Triton's own default is the same for all servers, which hides whose a region is. This one names this
        # process, so it is of no use in the printed command.
        prefix = cleanup.region_prefix(os.getpid())
        command.insert(1, f"--backend-config={PREFIX_SETTING}{prefix}")
    start_cleanup(prefix)
    os.execve(command[0], command, {**os.environ, **environment})


def given_prefix(arguments: Sequence[str]) -> str | None:
    """Prefix that the user gave to the names of shared memory regions; of several, Triton takes the last."""
    given = [
        setting.removeprefix(PREFIX_SETTING)
        for setting in flag_values(arguments, "--backend-config")
        if setting.startswith(PREFIX_SETTING)
    ]
    return given[-1] if given else None


def start_cleanup(prefix: str) -> None:
    """Start the process that cleans up after this server, even one that is killed."""
    owner = os.environ.get(OWNER_VARIABLE)
    pidfds = [*cleanup.own_pidfd(), *([int(owner)] if owner else [])]
    if not pidfds:
        log.warning("no pidfd before Linux 5.3: if this server is killed, end its model instances by hand")
        return
    subprocess.Popen(
        [sys.executable, "-P", cleanup.__file__, prefix, str(os.getpid()), *map(str, pidfds)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,  # or who reads the server's output would wait for this process as well
        stderr=subprocess.DEVNULL,
        pass_fds=pidfds,
        start_new_session=True,  # what ends the server's process group must not end it
    )
    for pidfd in pidfds:
        os.set_inheritable(pidfd, False)


def find_wheel() -> Path:
    """Folder of the installed ``pytriton`` package; importing it would load more than is needed."""
    library, version = platform.libc_ver()
    if library != "glibc" or _version(version) < MIN_GLIBC:
        raise LaunchError(
            f"expected Linux with glibc >= {MIN_GLIBC[0]}.{MIN_GLIBC[1]}, found {sys.platform} with "
            f"{library or 'another C library'} {version}: use Debian 12, Ubuntu 22.04 or newer, "
            "or NVIDIA's container (deploy/README.md)"
        )
    package = util.find_spec("pytriton")
    if package is None or package.origin is None:
        raise LaunchError("nvidia-pytriton is not installed in this Python: run `make setup`")
    wheel = Path(package.origin).parent
    stubs = wheel / "tritonserver" / STUBS
    if not (stubs / PYTHON).is_dir():
        supported = ", ".join(sorted((stub.name for stub in stubs.iterdir()), key=_version))
        raise LaunchError(f"expected Python {supported}, found {PYTHON}: make the .venv with one of these")
    return wheel


def check_packages() -> None:
    """Refuse an environment in which the backend would fail later, or give wrong answers."""
    if util.find_spec("onnxruntime") is None:
        raise LaunchError("onnxruntime is not installed in this Python: run `make setup`")
    numpy = metadata.version("numpy")
    if _version(numpy) >= (2,):
        raise LaunchError(
            f"expected numpy < 2, found {numpy}: under numpy 2 the server's Python stub returns empty "
            "tensors; run `pip install 'numpy<2'`"
        )


def find_libpython() -> Path:
    """Folder of the shared libpython of this very Python: the stub embeds it."""
    folders = (Path(sysconfig.get_config_var("LIBDIR")), Path(sys.base_prefix) / "lib")
    for folder in folders:
        if (folder / LIBPYTHON).exists():
            return folder
    raise LaunchError(
        f"expected {LIBPYTHON} in {folders[0]}, found none: install it (Debian: apt-get install "
        f"libpython{PYTHON}) or use a Python built with --enable-shared"
    )


def check_repositories(arguments: Sequence[str]) -> int:
    """Refuse a missing model repository, and one without exported models, in one line.

    Returns:
        Instances of all models that will be loaded, as far as is known.
    """
    instances = 0
    for flag in ("--model-repository", "--model-store"):
        for value in flag_values(arguments, flag):
            repository = Path(value)
            if "://" in value:
                continue  # object storage; Triton's own matter
            check_shell_safe(repository, "model repository")
            if not repository.is_dir():
                raise LaunchError(f"expected a model repository at {value}, found no such folder")
            if flag_values(arguments, "--model-control-mode"):
                continue  # models may come later
            for config in sorted(repository.glob("*/config.pbtxt")):
                instances += check_model(config.parent, flag_values(arguments, "--model-config-name"))
    return instances


def check_model(model: Path, targets: Sequence[str]) -> int:
    """Refuse a model whose chosen configuration names a file that is not there.

    Args:
        model: The model's folder.
        targets: Values of ``--model-config-name``, the last of which Triton takes.

    Returns:
        Its instances that the embedded server runs in processes of their own.
    """
    chosen = model / "configs" / f"{targets[-1]}.pbtxt" if targets else model / "config.pbtxt"
    text = (chosen if chosen.is_file() else model / "config.pbtxt").read_text()
    if not re.search(r'^backend: "onnxruntime"', text, re.MULTILINE):
        return 0
    named = re.search(r'^default_model_filename: "(.+)"', text, re.MULTILINE)
    file = named[1] if named else "model.onnx"
    if not any(model.glob(f"[0-9]*/{file}")):
        command = f"make export TARGET={targets[-1]}" if targets else "make export"
        raise LaunchError(f"{model / '1' / file} is missing: run `{command}`")
    return sum(map(int, re.findall(r"\bcount: (\d+)", text))) or 1


def check_shared_memory(instances: int) -> None:
    """Refuse to start where the instances' first megabytes do not fit."""
    folder = cleanup.SHARED_FOLDER
    if not folder.is_dir():
        raise LaunchError(
            f"expected shared memory at {folder}, found no such folder: mount -t tmpfs tmpfs {folder}"
        )
    free, wanted = shutil.disk_usage(folder).free, instances * REGION_BYTES
    if free < wanted:
        raise LaunchError(
            f"expected at least {wanted >> 20} MB free in {folder} for {instances} model instances, found "
            f"{free >> 20} MB: remove what fills it, or enlarge it (docker run --shm-size=2g, or "
            f"mount -o remount,size=2g {folder}); `make doctor` tells how much your frames need"
        )


def check_shell_safe(path: Path, what: str) -> None:
    """Refuse a path with spaces or quotes: Triton passes it unquoted to bash when it starts an instance."""
    if shlex.quote(str(path)) != str(path):
        raise LaunchError(f"expected a {what} without spaces or quotes in its path, found {path}: move it")


def copy_backends(wheel: Path) -> Path:
    """Put the wheel's Python backend and our ``onnxruntime`` backend into one folder for Triton.

    Copies, because Triton refuses a backend library that is a link out of this folder. The folder lies in the
    user's cache and its name is the hash of what it holds: a file in place is complete and right, and servers
    that start together cannot disturb each other.
    """
    triton = wheel / "tritonserver"
    sources = {
        "python/libtriton_python.so": triton / "backends/python/libtriton_python.so",
        "python/triton_python_backend_utils.py": triton / "backends/python/triton_python_backend_utils.py",
        "python/triton_python_backend_stub": triton / STUBS / PYTHON / "triton_python_backend_stub",
        "onnxruntime/model.py": SHIM,
        "onnxruntime/sequences.py": SHIM.with_name("sequences.py"),
    }
    digest = hashlib.sha256()
    for source in sources.values():
        digest.update(source.read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    backends = cache / "mst-gan-triton" / f"backends-{PYTHON}-{digest.hexdigest()[:16]}"
    check_shell_safe(backends, "cache folder (XDG_CACHE_HOME)")
    try:
        for name, source in sources.items():
            target = backends / name
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                handle, part = tempfile.mkstemp(dir=target.parent, prefix=f"{target.name}.")
                os.close(handle)
                shutil.copy(source, part)
                os.replace(part, target)
    except OSError as err:
        raise LaunchError(f"expected a writable cache folder, found {err}: set XDG_CACHE_HOME") from err
    return backends


def flag_values(arguments: Sequence[str], flag: str) -> list[str]:
    """Values given to a flag, as ``--flag=value`` or ``--flag value``."""
    values = [argument.partition("=")[2] for argument in arguments if argument.startswith(f"{flag}=")]
    return values + [value for name, value in pairwise(arguments) if name == flag]


def prepend(variable: str, *folders: Path) -> str:
    """A search path with these folders first."""
    return os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get(variable)])])


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text)[:2])


if __name__ == "__main__":
    main()
