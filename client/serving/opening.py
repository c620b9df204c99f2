"""A session from a list of addresses: what the command line and the library open."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

from .security import Security
from .server import NO_SECURITY, Server
from .session import Session

DEFAULT_MODEL = "mst_gan"
DEFAULT_PATIENCE_S = 60.0


@contextmanager
def open_session(
    urls: Iterable[str],
    model: str = DEFAULT_MODEL,
    security: Security = NO_SECURITY,
    patience_s: float = DEFAULT_PATIENCE_S,
    allow_mixed_weights: bool = False,
) -> Iterator[Session]:
    """Connect to servers of one ensemble, and hang up at the end.

    Args:
        urls: gRPC addresses, as ``address_from_url`` reads them.
        model: Name of the ensemble.
        security: For ``grpcs://`` addresses.
        patience_s: How long to go on without any server.
        allow_mixed_weights: Let servers with different weights answer, frame by frame.

    Raises:
        UpscaleError: A server is not there, or serves something else.
    """
    with ExitStack() as stack:
        servers = []
        for url in urls:
            servers.append(Server(url.strip(), model, security))
            stack.callback(servers[-1].close)
        yield Session(servers, patience_s, allow_mixed_weights=allow_mixed_weights)
