"""A target as the embedded server serves it to perf_analyzer, and what that takes of the GPU."""

from __future__ import annotations

import tempfile
from pathlib import Path

from deploy.embedded.server import ServerError, TritonServer
from perf.analyze import measure, warm_up
from perf.clip import Size
from perf.errors import PerfError, one_line
from perf.ladder.memory import gpu_memory_mb, watched
from perf.plan import Point, Sweep
from perf.sweep import MODELS, WORK, Contract, committed, request_target
from perf.tools import find_analyzer
from perf.variant import Serving, write_variant

FRAMES = 100  # of one of perf_analyzer's windows


def measure_served(
    target: str, size: Size, batch: int, timeout_s: float, repository: Path = MODELS, frames: int = FRAMES
) -> tuple[list[float], float | None]:
    """Frames/s of perf_analyzer's windows, with two requests in flight for each instance.

    Returns:
        Frames/s, and the most memory of the GPU in MiB, less what was in use before; None without a GPU.

    Raises:
        PerfError: The target is not built, its server does not start, or it does not answer in time.
    """
    WORK.mkdir(parents=True, exist_ok=True)
    in_flight = 2 * committed(repository)["instances"]
    point = Point(Serving(target), size, batch, in_flight, "system")
    sweep = Sweep("gpu", "", frames=frames, timeout_s=max(1, int(timeout_s)))
    before_mb = gpu_memory_mb()
    with tempfile.TemporaryDirectory(dir=WORK) as folder:
        models = Path(folder) / "models"
        models.mkdir()
        write_variant(repository, models, point.serving)
        try:
            server = TritonServer(models, Path(folder) / "triton.log", start_timeout_s=timeout_s)
            server.start()
            with watched(server.process.pid) as peak, server:
                request = request_target(server, point, Contract.of(repository), WORK)
                analyzer = find_analyzer()
                warm_up(analyzer, request, point, sweep.timeout_s)
                found = measure(analyzer, sweep, point, request, None)
        except ServerError as err:
            raise PerfError(one_line(err)) from err
    taken_mb = None if peak.gpu is None or before_mb is None else peak.gpu - before_mb
    return list(found.windows_fps[1:]), taken_mb
