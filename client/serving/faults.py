"""What the error of a request says: the server is busy, short of memory or lost, or refuses the request."""

from __future__ import annotations

import re
from enum import Enum

from tritonclient.utils import InferenceServerException


class Fault(Enum):
    """What an error means for the window and for its server."""

    BUSY = "busy"
    """The server takes nothing more just now: wait and ask for less at once."""
    MEMORY = "short of memory"
    """As busy, but it may never get better: a number of attempts, then the run ends."""
    LOST = "lost"
    """Nobody is there, or the server can no longer compute: ask another, look for it in the background."""
    REFUSED = "refused"
    """Asking again would change nothing."""


SILENT_STATUS = "silent"  # of the error that stands for an answer which has not come in time

# Triton: "Exceeds maximum queue size" and "Request timeout expired" (both UNAVAILABLE) of its schedulers'
# queues. Proxies: HTTP 429 as gRPC reports it, and Envoy's overflow of pending requests.
BUSY_TEXT = re.compile(
    r"maximum queue size|request timeout expired|too many requests|http2 header with status: 429"
    r"|reset reason: overflow",
    re.IGNORECASE,
)
BUSY_STATUS = ("StatusCode.RESOURCE_EXHAUSTED", "StatusCode.DEADLINE_EXCEEDED")
# gRPC has the status RESOURCE_EXHAUSTED for messages over a limit, too; those stay as large as they are.
TOO_LARGE_TEXT = re.compile(r"message larger than max|exceeds maximum.*protobuf", re.IGNORECASE)
# ONNX Runtime, CUDA and TensorRT, C++, and the Python backend when /dev/shm is full.
MEMORY_TEXT = re.compile(
    r"out of memory|failed to allocate|bad_alloc|shared memory pool size|no space left on device",
    re.IGNORECASE,
)
# How gRPC says that nobody is there, or that a server on its way out dropped the call. While Triton stops,
# it answers for seconds that it is "stopping" (UNAVAILABLE), then that the model "has no available
# versions" (NOT_FOUND). A session's servers have all served the ensemble once, so that one is gone is no
# mistake of the user's.
LOST_STATUS = (
    "StatusCode.UNAVAILABLE",
    "StatusCode.CANCELLED",
    "StatusCode.NOT_FOUND",
    SILENT_STATUS,
)
# A Python backend whose process died (Triton goes on reporting that it is healthy); a server that was
# started again and knows no shared memory of before; a stream that a proxy broke off; a connection that this
# client gave up at the same moment.
LOST_TEXT = re.compile(
    r"stub process .*is not healthy|shared memory region|RST_STREAM|GOAWAY|closed channel",
    re.IGNORECASE,
)


def fault_of(error: InferenceServerException) -> Fault:
    """Tell what an error means."""
    text, status = error.message() or "", error.status()
    if TOO_LARGE_TEXT.search(text):
        return Fault.REFUSED
    if MEMORY_TEXT.search(text):
        return Fault.MEMORY
    if BUSY_TEXT.search(text) or status in BUSY_STATUS:
        return Fault.BUSY
    if LOST_TEXT.search(text) or status in LOST_STATUS:
        return Fault.LOST
    return Fault.REFUSED


def as_server_error(err: BaseException) -> InferenceServerException:
    """Give anything that was raised over a request the form of a server's error."""
    if isinstance(err, InferenceServerException):
        return err
    wrapped = InferenceServerException(f"{type(err).__name__}: {err}")
    wrapped.__cause__ = err
    return wrapped
