"""The wheel in an empty environment: what it installs, that its command runs, and that it upscales a clip."""

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest
from client_fakes import FakeTriton, decoded, pictures, write_clip

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "client/upscale.py"
PACKAGE = "mst_gan_client"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # packages come over the network


def run(*command: object, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command without what the tests' own environment adds; only PATH and the proxy settings pass."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "UPSCALE_"))}
    kept.pop("VSR_DEBUG", None)
    return subprocess.run(
        [*map(str, command)], cwd=cwd, env=kept | environment, capture_output=True, text=True, check=False
    )


def newest_other_python() -> str | None:
    """The newest interpreter on this machine that the client supports, beside the one that runs the tests."""
    for minor in (13, 12, 11):
        for name in (f"python3.{minor}", *Path.home().glob(f".pyenv/versions/3.{minor}.*/bin/python")):
            path = shutil.which(str(name))
            if (
                path
                and sys.version_info[:2] != (3, minor)
                and not run(path, "-c", "import ensurepip").returncode
            ):
                return path
    return None


def install(python: Path, wheel: Path) -> None:
    """Install the wheel and what it asks for."""
    options = ("--no-compile", "--disable-pip-version-check")
    installed = run(python, "-m", "pip", "install", *options, wheel)
    assert installed.returncode == 0, installed.stderr


def check_command(command: Path, folder: Path) -> None:
    """The command shows its help, and upscales a clip exactly."""
    usage = run(command, "--help", cwd=folder)
    assert usage.returncode == 0, usage.stderr
    assert "IN OUT" in usage.stdout
    images = pictures(3)
    clip = write_clip(folder / "in.mkv", images, codec="ffv1", pix_fmt="bgr0")
    with FakeTriton() as triton:
        lossless = ("--codec", "ffv1", "--pix-fmt", "bgr0")
        done = run(command, clip, folder / "out.mkv", "--url", triton.url, *lossless, cwd=folder)
    assert done.returncode == 0, done.stderr
    hr = [image.repeat(4, axis=0).repeat(4, axis=1) for image in images]
    np.testing.assert_array_equal(decoded(folder / "out.mkv", "rgb24"), hr)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's wheel, built from a copy, for setuptools leaves files beside what it builds."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "client", source / "client", ignore=shutil.ignore_patterns("__pycache__"))
    built = run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", out, source)
    assert built.returncode == 0, built.stderr
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty environment with the wheel and nothing but what it asks for."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    install(folder / "bin/python", wheel)
    return folder


def test_the_wheel_holds_one_package_and_all_of_it(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        info = next(name for name in names if name.endswith("entry_points.txt"))
        assert archive.read(info).decode().split() == [
            "[console_scripts]",
            "mst-gan-upscale",
            "=",
            "mst_gan_client.upscale:main",
        ]
    top_level = {name.partition("/")[0] for name in names}
    assert {name for name in top_level if not name.endswith(".dist-info")} == {PACKAGE}
    packed = {name for name in names if name.startswith(f"{PACKAGE}/")}
    sources = {f"{PACKAGE}/{path.relative_to(ROOT / 'client')}" for path in ROOT.glob("client/**/*.py")}
    assert packed == sources | {f"{PACKAGE}/py.typed"}


def test_the_installed_command_upscales_a_clip(environment: Path, tmp_path: Path) -> None:
    command = environment / "bin/mst-gan-upscale"
    where = run(environment / "bin/python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
    installed = {path.stem for path in Path(where.stdout.strip()).iterdir()}
    assert PACKAGE in installed
    generic = {"export", "deploy", "client", "perf", "tests"} | {
        path.stem for path in ROOT.glob("client/*.py")
    }
    assert not installed & (generic - {"__init__", "__main__"})

    check_command(command, tmp_path)


def test_the_wheel_runs_on_another_python(wheel: Path, tmp_path: Path) -> None:
    python = newest_other_python()
    if python is None:
        pytest.skip("no other Python between 3.11 and 3.13 on this machine")
    created = run(python, "-m", "venv", tmp_path / "other")
    assert created.returncode == 0, created.stderr
    install(tmp_path / "other/bin/python", wheel)
    check_command(tmp_path / "other/bin/mst-gan-upscale", tmp_path)


def test_a_checkout_runs_without_being_installed(tmp_path: Path) -> None:
    """The script's own folder serves as the package, whatever is installed beside it."""
    code = (
        "import runpy, sys\n"
        "sys.meta_path = [finder for finder in sys.meta_path if 'editable' not in repr(finder).lower()]\n"
        "sys.argv = ['upscale.py', '--help']\n"
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    )
    isolated = run(sys.executable, "-c", code, cwd=tmp_path)
    assert isolated.returncode == 0, isolated.stderr
    assert "IN OUT" in isolated.stdout


def test_a_python_without_the_packages_is_told_what_to_run(tmp_path: Path) -> None:
    venv.create(tmp_path / "bare", with_pip=False)
    bare = run(tmp_path / "bare/bin/python", SCRIPT, "a clip.mp4", "out.mp4", cwd=ROOT)
    assert bare.returncode == 1
    (line,) = bare.stderr.splitlines()
    assert line.startswith("expected the Python package ")
    if (ROOT / ".venv/bin/python").exists():
        assert line.endswith("run .venv/bin/python client/upscale.py 'a clip.mp4' out.mp4")
    else:
        assert line.endswith("-m pip install .")
    assert not bare.stdout
