"""How much a test asks of a server at once, and what the server says it ran."""

import re

from deploy.embedded.server import TritonServer
from export import spec

IN_FLIGHT = 2 * spec.MAX_BATCH * len(spec.INSTANCE_GROUPS)  # enough that every instance can fill a batch


def executions(server: TritonServer, model: str) -> tuple[int, int]:
    """Frames inferred by a model so far, and runs it took."""
    metrics = server.metrics()
    counts = [
        re.search(rf'^{name}{{model="{model}",version="1"}} (\d+)$', metrics, re.MULTILINE)
        for name in ("nv_inference_count", "nv_inference_exec_count")
    ]
    frames, runs = (int(count[1]) if count else 0 for count in counts)
    return frames, runs
