"""The files of ``deploy/farm/`` on Slurm itself: a controller and a node on this machine."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from client_fakes import LOSSLESS, FakeTriton, decoded, pictures, run_client, write_clip
from requirements import missing

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

FARM = Path(__file__).parents[2] / "deploy" / "farm"
PATIENCE_S = 60
SEGMENT = ("--segment-frames", "5", *LOSSLESS)
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={node}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
NodeName={host} NodeAddr=127.0.0.1 CPUs=8 State=UNKNOWN
PartitionName=farm Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment in which Slurm's commands find a cluster of one node."""
    programs = ("slurmctld", "slurmd", "sbatch", "sinfo")
    if lacking := [name for name in programs if not shutil.which(name)]:
        missing("SLURM", f"{', '.join(lacking)} not found: apt-get install slurmctld slurmd slurm-client")
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool"):
        (folder / name).mkdir()
    with ExitStack() as stack:
        ports = []
        for _ in range(2):
            with socket.create_server(("127.0.0.1", 0)) as listener:
                ports.append(listener.getsockname()[1])
        host = socket.gethostname().partition(".")[0]
        config = folder / "slurm.conf"
        settings = {"host": host, "controller": ports[0], "node": ports[1], "user": getpass.getuser()}
        config.write_text(CONFIG.format(folder=folder, **settings))
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = {**os.environ, "SLURM_CONF": str(config), "PATH": path}
        for command in (["slurmctld", "-D"], ["slurmd", "-D", "-N", host]):
            with (folder / f"{command[0]}.out").open("w") as output:
                process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
            stack.callback(process.wait)
            stack.callback(process.terminate)
        until_s = time.monotonic() + PATIENCE_S
        while "idle" not in asked(environment, "sinfo", "--noheader", "--format=%t"):
            logs = "".join(path.read_text()[-2000:] for path in sorted(folder.glob("slurm*.*")))
            assert time.monotonic() < until_s, logs
            time.sleep(0.2)
        yield environment


def asked(environment: dict[str, str], *command: str) -> str:
    return subprocess.run(command, env=environment, capture_output=True, text=True).stdout


def submit(environment: dict[str, str], folder: Path, array: str, script: str, *arguments: object) -> None:
    """Submit a job array and wait for its end; fails as the tasks do."""
    options = [f"--array={array}", "--cpus-per-task=1", "--mem=0", "--wait", f"--output={folder}/%A_%a.log"]
    command = ["sbatch", *options, str(FARM / script), *map(str, arguments)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    logs = "".join(path.read_text() for path in sorted(folder.glob("*.log")))
    assert run.returncode == 0, run.stderr + logs


@pytest.fixture
def triton() -> Iterator[FakeTriton]:
    with FakeTriton() as server:
        yield server


def test_a_clip_as_an_array(slurm: dict[str, str], triton: FakeTriton, tmp_path: Path) -> None:
    """Each task has a shard, and joined they are what one run gives."""
    clip = write_clip(tmp_path / "in.mkv", pictures(40), codec="ffv1", pix_fmt="bgr0")
    out, once = tmp_path / "out.mkv", tmp_path / "once.mkv"
    submit(slurm, tmp_path, "1-3", "slurm.sh", clip, out, "--url", triton.url, *SEGMENT)
    assert len(list(tmp_path.glob("out.mkv.*.shard"))) == 3
    assert run_client("join", clip, out).exit_code == 0
    assert run_client(clip, once, "--url", triton.url, *SEGMENT).exit_code == 0
    assert all(map(np.array_equal, decoded(out), decoded(once))) and len(decoded(out)) == 40


def test_a_folder_of_films_over_like_workers(
    slurm: dict[str, str], triton: FakeTriton, tmp_path: Path
) -> None:
    (tmp_path / "films").mkdir()
    for number in range(4):
        images = pictures(6 + number)
        write_clip(tmp_path / "films" / f"{number}.mkv", images, codec="ffv1", pix_fmt="bgr0")
    out = tmp_path / "out"
    submit(slurm, tmp_path, "1-2", "slurm-folder.sh", tmp_path / "films", out, "--url", triton.url, *SEGMENT)
    lengths = {path.name: len(decoded(path)) for path in out.iterdir()}
    assert lengths == {f"{number}.mkv": 6 + number for number in range(4)}
