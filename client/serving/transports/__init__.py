"""How windows and answers pass between the client and one server: the best way that works there."""

from __future__ import annotations

import socket

from tritonclient.grpc import InferenceServerClient
from tritonclient.utils import InferenceServerException

from .cuda import CudaRing
from .ring import Ring
from .system import SystemRing

AUTO, GRPC = "auto", "grpc"
SHARED_MEMORY: dict[str, type[Ring]] = {"cuda": CudaRing, "system": SystemRing}  # best first
NAMES = {"cuda": "CUDA shared memory", "system": "system shared memory"}
TRANSPORTS = (AUTO, *SHARED_MEMORY, GRPC)


def ring_for(
    client: InferenceServerClient,
    address: str,
    slots: int,
    lr_shape: tuple[int, ...],
    hr_shape: tuple[int, ...],
    transport: str,
) -> tuple[Ring | None, str]:
    """Share memory with a server, if that can be.

    Args:
        client: Connected to the server.
        address: The server's ``host:port``.
        slots: Requests in flight.
        lr_shape: Shape of every window, (T, H, W, 3).
        hr_shape: Shape of every answer.
        transport: One of ``TRANSPORTS``; a named one is tried alone.

    Returns:
        The ring, or None for gRPC; and in words which it is and why nothing better.
    """
    if transport == GRPC:
        return None, "gRPC (as asked)"
    reasons = []
    for name in SHARED_MEMORY if transport == AUTO else (transport,):
        ring = None
        try:
            # A GPU's memory has no name that another machine could not know; who asks for it knows better.
            if name == "cuda" and transport == AUTO and not is_on_this_machine(address):
                raise OSError(None, f"{address} is another machine")
            ring = SHARED_MEMORY[name](client, slots, lr_shape, hr_shape)
        except OSError as err:
            reasons.append(f"no {NAMES[name]}: {err.strerror}")
        except InferenceServerException as err:
            reasons.append(f"no {NAMES[name]} with {address}: {err.message()}")
        if ring:
            return ring, " ".join([NAMES[name], *(f"({reason})" for reason in reasons)])
    return None, f"gRPC ({'; '.join(reasons)})"


def is_on_this_machine(address: str) -> bool:
    """Whether the host of a ``host:port`` is an address of this machine; nothing else can be bound to."""
    host = address.rpartition(":")[0].strip("[]")
    for family, kind, protocol, _, where in socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM):
        with socket.socket(family, kind, protocol) as one:
            try:
                one.bind(where)
            except OSError:
                continue
            return True
    return False
