"""Fixtures of more than one test file: a small repository of the served contract, and a server on it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from matrix_summary import matrix_cell, pytest_terminal_summary  # noqa: F401 (pytest finds them here)
from tiny_network import LIGHT, TINY, run_build, shake
from toy_models import add_batch_witness, build_toy_models

from deploy.embedded.server import TritonServer
from export import repository
from export.checkpoint import save_checkpoint
from export.data import sample
from export.network import WIDTHS, MstGan
from export.verify import compare

torch.set_num_threads(1)  # on frames this small a second thread costs more than it gains

pytest_plugins = ["leftovers"]

# A shell that starts tests in the background has them ignore Ctrl-C, and with them every client they start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of a whole build are slow, as it takes a minute."""
    for item in items:
        if "built" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Where ``REQUIRE_ALL`` is set, as in CI, only tests that need a GPU may be skipped."""
    outcome = yield
    report = outcome.get_result()
    if report.skipped and os.environ.get("REQUIRE_ALL") and not item.get_closest_marker("gpu"):
        reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped, and REQUIRE_ALL is set: {reason}"


@pytest.fixture(scope="session")
def toy_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete model repository with small models; not to be changed."""
    folder = tmp_path_factory.mktemp("toy")
    build, models = folder / "build", folder / "model_repository"
    build.mkdir()
    build_toy_models(build)
    repository.write_configs(models)
    repository.install(build, models, repository.Weights("toy", "0" * 64))
    add_batch_witness(models)
    return models


@pytest.fixture(scope="session")
def toy_server(toy_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """The embedded server with the small models."""
    with TritonServer(toy_repository, tmp_path_factory.mktemp("server") / "triton.log") as server:
        yield server


@pytest.fixture
def tiny_widths(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny networks' width tables among those that checkpoints and training know; errors as one line."""
    monkeypatch.setitem(WIDTHS, TINY.name, TINY)
    monkeypatch.setitem(WIDTHS, LIGHT.name, LIGHT)
    monkeypatch.delenv("VSR_DEBUG", raising=False)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Weights of the tiny network, as the build command takes them."""
    path = tmp_path_factory.mktemp("checkpoint") / "tiny.safetensors"
    torch.manual_seed(0)
    save_checkpoint(shake(MstGan(TINY)), path, {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(WIDTHS, TINY.name, TINY)
        patch.setattr(compare, "CASES", ((4, (20, 36)), (1, (36, 20))))
        patch.setattr(compare, "SPOTS", compare.SPOTS[:1])  # each takes seconds, and these weights are random
        patch.setattr(sample, "CALIBRATION_CLIPS", (sample.CLIP,))
        patch.delenv("VSR_DEBUG", raising=False)
        yield path


@pytest.fixture(scope="session")
def built(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that one successful build for the CPU has filled; not to be changed.

    Building takes minutes, so the first worker of pytest-xdist that needs it builds for all.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # of this run, with one folder for each worker
    folder /= "built"
    is_done = folder / "done"
    with FileLock(folder.with_suffix(".lock")):
        if not is_done.exists():
            folder.mkdir(exist_ok=True)
            result = run_build(checkpoint, folder, "--target", "cpu")
            assert result.exit_code == 0, result.output
            is_done.touch()
    return folder
