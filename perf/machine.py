"""What a measurement was made on, and the memory and processor time that it took."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import pynvml

ROOT = Path(__file__).parent.parent
PACKAGES = ("nvidia-pytriton", "onnxruntime-gpu", "torch", "tritonclient", "numpy", "av")
MEASURED = ("client", "deploy", "export", "model_repository", "perf/*.py", "perf/*.toml")
VECTOR_UNITS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8")  # what convolutions run on
QUIET_CORES = 0.15  # what an idle system uses by itself
INTERVAL_S = 0.2
MB = 2**20


def machine() -> dict[str, object]:
    """Processor, memory, load, GPU, versions, date and commit; goes into every results file."""
    cpuinfo = Path("/proc/cpuinfo").read_text()  # psutil knows neither the name nor the instructions
    facts = dict(re.findall(r"^(model name|flags)\s*: (.*)$", cpuinfo, re.MULTILINE))
    return {
        "cpu": facts.get("model name", platform.processor()),
        "cores": len(os.sched_getaffinity(0)),
        "vector_units": [unit for unit in VECTOR_UNITS if unit in facts.get("flags", "").split()],
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": gpu(),
        "system": f"{platform.system()} {platform.release()}, glibc {platform.libc_ver()[1]}",
        "python": platform.python_version(),
        "versions": {name: one.version for name in PACKAGES for one in metadata.distributions(name=name)},
        "load_1m_at_start": round(psutil.getloadavg()[0], 2),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
    }


def gpu() -> str | None:
    """Name, memory and driver of the first GPU, or None."""
    if (handle := _gpu_handle()) is None:
        return None
    total = pynvml.nvmlDeviceGetMemoryInfo(handle).total // MB
    return f"{pynvml.nvmlDeviceGetName(handle)}, {total} MiB, {pynvml.nvmlSystemGetDriverVersion()}"


def gpu_memory_mb() -> float | None:
    """Memory in use on the first GPU in MiB, or None."""
    handle = _gpu_handle()
    return None if handle is None else float(pynvml.nvmlDeviceGetMemoryInfo(handle).used / MB)


@cache
def _gpu_handle() -> Any:
    try:
        pynvml.nvmlInit()
        return pynvml.nvmlDeviceGetHandleByIndex(0)
    except pynvml.NVMLError:
        return None


def _commit() -> str:
    """Short hash, with ``+`` where files that are measured differ from it."""
    command = ["git", "describe", "--always", "--exclude=*"]
    head = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    changed = subprocess.run(
        ["git", "diff", "--quiet", "HEAD", "--", *MEASURED], cwd=ROOT, capture_output=True
    )
    return "unknown" if head.returncode else head.stdout.strip() + "+" * bool(changed.returncode)


class Watch:
    """Peak memory of a process with its children, and the cores that all but these and we use."""

    def __init__(self, pid: int | None = None) -> None:
        """Watch this process id; None: only the others."""
        self.pid, self.stopped = pid, threading.Event()
        self.thread = threading.Thread(target=self._sample_on, daemon=True)

    def __enter__(self) -> Watch:
        """Begin to sample."""
        self._restart()
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Sample no more."""
        self.stopped.set()
        self.thread.join()

    def lap(self) -> dict[str, float | None]:
        """Since the start or the last lap: peak memory in MiB, shared pages counted once; others' cores."""
        self._sample()
        others = (self._others_s() - self.others_s) / (time.monotonic() - self.started_s)
        memory_mb = None if self.pid is None else round(self.memory_mb, 1)
        found = {
            "memory_mb": memory_mb,
            "gpu_memory_mb": self.gpu_mb,
            "others_cores": round(max(0, others), 2),
        }
        self._restart()
        return found

    def _restart(self) -> None:
        self.memory_mb, self.gpu_mb = 0.0, gpu_memory_mb()
        self.started_s, self.others_s = time.monotonic(), self._others_s()

    def _sample_on(self) -> None:
        while not self.stopped.wait(INTERVAL_S):
            self._sample()

    def _sample(self) -> None:
        used = 0.0
        for process in self._processes():
            with suppress(psutil.Error):
                used += process.memory_full_info().pss / MB
        self.memory_mb = max(self.memory_mb, used)
        if (on_gpu := gpu_memory_mb()) is not None:
            self.gpu_mb = max(self.gpu_mb or 0.0, on_gpu)

    def _processes(self) -> list[psutil.Process]:
        with suppress(psutil.Error):
            if self.pid is not None:
                parent = psutil.Process(self.pid)
                return [parent, *parent.children(recursive=True)]
        return []

    def _others_s(self) -> float:
        """Processor seconds of others since boot."""
        total = psutil.cpu_times()
        busy = total.user + total.nice + total.system + total.irq + total.softirq + total.steal
        for process in (psutil.Process(), *self._processes()):
            with suppress(psutil.Error):
                busy -= sum(process.cpu_times()[:4])  # user and system, its and its ended children's
        return float(busy)
