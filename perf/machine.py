"""Where and with what something was measured; goes into every results file."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("nvidia-pytriton", "onnxruntime-gpu", "torch", "tritonclient", "numpy", "av")
MEASURED = ("client", "deploy", "export/network", "model_repository", "perf/*.py", "perf/*.toml")


def machine() -> dict[str, object]:
    """Processor, memory, load, GPU, versions, date and commit."""
    load = os.getloadavg()[0]
    return {
        "cpu": _proc("/proc/cpuinfo", "model name") or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "vector_units": vector_units(),
        "memory_gb": round(int(_proc("/proc/meminfo", "MemTotal").split()[0]) / 2**20, 1),
        "gpu": gpu(),
        "system": f"{platform.system()} {platform.release()}, glibc {platform.libc_ver()[1]}",
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        "load_1m_at_start": round(load, 2),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
    }


def vector_units() -> list[str]:
    """The instruction sets that decide how fast a convolution runs on this processor."""
    flags = _proc("/proc/cpuinfo", "flags").split()
    return [unit for unit in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8") if unit in flags]


def gpu() -> str | None:
    """Name, memory and driver of the first GPU, or None."""
    if not shutil.which("nvidia-smi"):
        return None
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    run = subprocess.run(query, capture_output=True, text=True)
    return run.stdout.splitlines()[0] if run.returncode == 0 and run.stdout else None


def commit() -> str:
    """Short hash, with ``+`` where files that are measured differ from it."""
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    changed = subprocess.run(
        ["git", "diff", "--quiet", "HEAD", "--", *MEASURED], cwd=ROOT, capture_output=True
    )
    return head.stdout.strip() + ("+" if changed.returncode else "") if head.returncode == 0 else "unknown"


def _proc(path: str, key: str) -> str:
    lines = Path(path).read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
