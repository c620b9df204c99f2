"""Whether a server still answers: a few tiny frames through the ensemble.

Triton's own health checks stay green after a model instance has died. This probe is for Docker's
``HEALTHCHECK`` and Kubernetes' liveness, in any image with Python: it needs the standard library alone. It
sends several requests, one after another, so that every instance gets some. A server that is busy, and
answers others meanwhile, is alive.
"""

from __future__ import annotations

import argparse
import http.client
import json
import sys
from typing import Any

SIDE = 16  # pixels: the smallest size that servers are warmed up with
BUSY = (429, 503)  # the queue is full, or the request waited too long in it


class NotAliveError(Exception):
    """The text says what was expected and what was found."""


def call(url: str, path: str, timeout_s: float, body: dict[str, Any] | None = None) -> tuple[int, bytes]:
    """Status and content of an answer; a POST where there is a body."""
    connection = http.client.HTTPConnection(url, timeout=timeout_s)
    try:
        connection.request("POST" if body else "GET", path, json.dumps(body) if body else None)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def fetch(url: str, path: str, timeout_s: float) -> dict[str, Any]:
    """A JSON answer.

    Raises:
        NotAliveError: The server answered with an error.
    """
    status, content = call(url, path, timeout_s)
    if status != http.client.OK:
        raise NotAliveError(f"expected status 200 from {path}, found {status}: {content.decode()[:200]}")
    found: dict[str, Any] = json.loads(content)
    return found


def frames_done(url: str, model: str, timeout_s: float) -> int:
    """Frames that the ensemble has answered since the server started."""
    statistics = fetch(url, f"/v2/models/{model}/stats", timeout_s)["model_stats"]
    return sum(int(version["inference_stats"]["success"]["count"]) for version in statistics)


def probe(url: str, model: str, requests: int, timeout_s: float) -> str:
    """Send black frames through the ensemble.

    Args:
        url: ``host:port`` of Triton's HTTP.
        model: Name of the ensemble.
        requests: How many, one after another.
        timeout_s: Seconds for each.

    Returns:
        What was found, for the log.

    Raises:
        NotAliveError: A request failed, or none was answered in time, neither ours nor anyone's.
    """
    inputs = []
    for tensor in fetch(url, f"/v2/models/{model}", timeout_s)["inputs"]:
        batch, *dims = tensor["shape"]
        shape = [1 if batch < 0 else batch, *(SIDE if size < 0 else size for size in dims)]
        count = 1
        for size in shape:
            count *= size
        inputs.append({**tensor, "shape": shape, "data": [0] * count})
    body = {"inputs": inputs, "parameters": {"priority": 1}}  # before all others in every queue
    before = frames_done(url, model, timeout_s)
    for answered in range(requests):
        try:
            status, content = call(url, f"/v2/models/{model}/infer", timeout_s, body)
            problem = f"status {status}: {content.decode(errors='replace')[:200]}"
        except TimeoutError:
            status, problem = BUSY[0], f"no answer in {timeout_s:g} s"
        if status in BUSY:
            if frames_done(url, model, timeout_s) <= before + answered:
                raise NotAliveError(
                    f"expected an answer from {model}, found {problem}, and no other frame done"
                )
            return f"{model} is busy and answers others ({problem})"
        if status != http.client.OK:
            raise NotAliveError(f"expected an answer from {model}, found {problem}")
    return f"{model} answered {requests} requests"


def main() -> None:
    """Exit status 0 if the server is alive, else 1; one line says why."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="localhost:8000", help="host:port of Triton's HTTP")
    parser.add_argument("--model", default="mst_gan")
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--timeout", type=float, default=15, help="seconds for each request")
    options = parser.parse_args()
    try:
        sys.stdout.write(probe(options.url, options.model, options.requests, options.timeout) + "\n")
    except (NotAliveError, OSError, http.client.HTTPException, ValueError, LookupError) as err:
        sys.exit(f"not alive: {err if isinstance(err, NotAliveError) else repr(err)}")


if __name__ == "__main__":
    main()
