"""Addresses of servers: how they are written, and what is behind a name with several."""

from __future__ import annotations

import ipaddress
import socket
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import urlsplit

from ..errors import ServerError, UpscaleError

DEFAULT_URL = "localhost:8001"
DEFAULT_GRPC_PORT = 8001
PLAIN, TLS, DNS, TLS_DNS = "grpc", "grpcs", "dns", "grpcs+dns"


@dataclass(frozen=True)
class Address:
    """Where one server is."""

    host_port: str
    tls: bool
    name: str | None = None
    """The host name that its certificate must have, if the address is a number behind a name."""


def address_from_url(url: str) -> tuple[str, bool]:
    """Split a server's URL into ``host:port`` and whether to speak TLS.

    ``host``, ``host:port``, ``grpc://host:port`` and, for TLS, ``grpcs://host:port`` are understood; with
    ``dns:///host:port`` and ``grpcs+dns:///host:port`` every address behind the name is a server of its own.
    IPv6 addresses stand in brackets if a port follows.
    """
    scheme, _, rest = url.rpartition("://")
    if scheme not in ("", PLAIN, TLS, DNS, TLS_DNS):
        raise UpscaleError(
            f"expected a gRPC address such as {DEFAULT_URL}, found {url!r}: "
            f"this client does not speak {scheme}; Triton's gRPC port is usually {DEFAULT_GRPC_PORT}"
        )
    if scheme in (DNS, TLS_DNS):
        resolver, _, rest = rest.partition("/")
        if resolver:
            raise UpscaleError(
                f"expected {scheme}:///HOST:PORT, found {url!r}: names are looked up by this machine's own "
                f"resolver; write {scheme}:///{rest}"
            )
    with suppress(ValueError):  # brackets were forgotten
        rest = f"[{ipaddress.IPv6Address(rest)}]"
    try:
        parts = urlsplit(f"//{rest}")
        host, port = parts.hostname, parts.port or DEFAULT_GRPC_PORT
    except ValueError:  # a port that is no number, or out of range
        host, port = None, 0
    if not host or parts.path or parts.query:
        raise UpscaleError(f"expected HOST:PORT, found {url!r}: give --url like {DEFAULT_URL}")
    return (f"[{host}]:{port}" if ":" in host else f"{host}:{port}"), scheme in (TLS, TLS_DNS)


def addresses_from_url(url: str) -> list[Address]:
    """Find the servers that a URL means: one, or with ``dns:///`` all behind the name.

    Raises:
        ServerError: The name is not known.
        UpscaleError: It is no URL of a server.
    """
    host_port, tls = address_from_url(url)
    if url.partition("://")[0] not in (DNS, TLS_DNS):
        return [Address(host_port, tls)]
    host, _, port = host_port.rpartition(":")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except OSError as err:
        raise ServerError(
            f"no address is known for {host} ({err.strerror}): check the name in {url!r}"
        ) from err
    numbers = dict.fromkeys(str(where[0]) for *_, where in found)
    return [Address(f"[{one}]:{port}" if ":" in one else f"{one}:{port}", tls, host) for one in numbers]
