"""What it takes to reach a server over TLS."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import grpc

from ..errors import UpscaleError


@dataclass(frozen=True)
class Security:
    """Certificates and a token for servers that are asked over TLS (``grpcs://``)."""

    ca: Path | None = None
    """PEM file of the authorities to trust; None: those that gRPC carries."""
    certificate: Path | None = None
    """PEM file of the client's own certificate chain."""
    key: Path | None = None
    """PEM file of the key to it."""
    token: str | None = field(default=None, repr=False)
    """Sent as ``authorization: Bearer ...`` with every request."""

    def credentials(self) -> grpc.ChannelCredentials:
        """Make them ready for a channel.

        Raises:
            UpscaleError: A file is not there, or only one of a pair is given.
        """
        if (self.certificate is None) != (self.key is None):
            raise UpscaleError("expected --tls-cert and --tls-key together, found one of them: give both")
        try:
            ca, key, certificate = (
                path.read_bytes() if path else None for path in (self.ca, self.key, self.certificate)
            )
        except OSError as err:
            raise UpscaleError(f"cannot read {err.filename} ({err.strerror}): check --tls-*") from err
        credentials = grpc.ssl_channel_credentials(ca, key, certificate)
        if self.token is None:
            return credentials
        return grpc.composite_channel_credentials(credentials, grpc.access_token_call_credentials(self.token))

    def refuse_in_the_clear(self, address: str) -> None:
        """Do not let secrets travel unencrypted.

        Raises:
            UpscaleError: Any of this is given.
        """
        if self != Security():
            raise UpscaleError(
                f"expected TLS for --token and --tls-*, found plain gRPC at {address}: "
                f"write --url grpcs://{address}"
            )
