"""One Triton server: its contract, read from its own config, and asynchronous inference over gRPC."""

from __future__ import annotations

import http.client
import logging
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from tritonclient.grpc import (
    InferenceServerClient,
    InferInput,
    InferRequestedOutput,
    InferResult,
)
from tritonclient.grpc.model_config_pb2 import ModelConfig
from tritonclient.utils import InferenceServerException

from ..errors import ServerError, UpscaleError
from ..frames.windows import Image
from .contract import contract_from_config, instance_count
from .identity import Identity, identity_of
from .probe import PROBE_ID, probe_window
from .security import Security
from .transports import AUTO, ring_for
from .transports.ring import RELEASE_TIMEOUT_S, Ring, kept_rings

DEFAULT_URL = "localhost:8001"
DEFAULT_GRPC_PORT = 8001
ASK_TIMEOUT_S = 10.0  # for questions about health and configuration, which cost the server nothing
PROBE_TIMEOUT_S = 300.0  # the window is tiny, but may wait behind the frames of others
NO_SECURITY = Security()
UNLIMITED_BYTES = 2**31 - 1  # an hr frame of a 1280x720 clip is 44 MB; gRPC would stop at 4 MB
RECONNECT_MS = 1000  # gRPC's own pause between connection attempts grows to two minutes otherwise

START_HINT = "start one with `make serve`, or name another with --url"

log = logging.getLogger(__name__)

Done = Callable[["Image | None", "InferenceServerException | None"], None]


def address_from_url(url: str) -> tuple[str, bool]:
    """Split a server's URL into ``host:port`` and whether to speak TLS.

    ``host``, ``host:port``, ``grpc://host:port`` and, for TLS, ``grpcs://host:port`` are understood.
    """
    scheme, _, rest = url.rpartition("://")
    if scheme not in ("", "grpc", "grpcs"):
        raise UpscaleError(
            f"expected a gRPC address such as {DEFAULT_URL}, found {url!r}: "
            f"this client does not speak {scheme}; Triton's gRPC port is usually {DEFAULT_GRPC_PORT}"
        )
    try:
        parts = urlsplit(f"//{rest}")
        host, port = parts.hostname, parts.port or DEFAULT_GRPC_PORT
    except ValueError:  # a port that is no number, or out of range
        host, port = None, 0
    if not host or parts.path or parts.query:
        raise UpscaleError(f"expected HOST:PORT, found {url!r}: give --url like {DEFAULT_URL}")
    return (f"[{host}]:{port}" if ":" in host else f"{host}:{port}"), scheme == "grpcs"


class Server:
    """One Triton server that serves the ensemble.

    Args:
        url: As ``address_from_url`` reads it.
        model: Name of the ensemble.
        security: For ``grpcs://`` addresses.

    Raises:
        UpscaleError: No server there, or none that serves such an ensemble.
    """

    in_flight: int
    """Requests that keep this server busy."""

    def __init__(self, url: str, model: str, security: Security = NO_SECURITY) -> None:
        self.address, tls = address_from_url(url)
        self._is_closed = False
        self._ring: Ring | None = None
        self._calls: dict[object, Any] = {}
        """Requests under way, each with what cancels it."""
        self._transport = AUTO
        self._identity: Identity | None = None
        options = [
            ("grpc.max_send_message_length", UNLIMITED_BYTES),
            ("grpc.max_receive_message_length", UNLIMITED_BYTES),
            ("grpc.initial_reconnect_backoff_ms", RECONNECT_MS // 10),
            ("grpc.min_reconnect_backoff_ms", RECONNECT_MS // 10),
            ("grpc.max_reconnect_backoff_ms", RECONNECT_MS),
        ]
        if not tls:
            security.refuse_in_the_clear(self.address)
        credentials = security.credentials() if tls else None
        self._client = InferenceServerClient(self.address, creds=credentials, channel_args=options)
        try:
            self._ensemble = config = self._config(model)
            self.contract = contract_from_config(config, self.address)
            steps = {step.model_name for step in config.ensemble_scheduling.step} or {model}
            instances = min(instance_count(self._config(step)) for step in steps)
        except BaseException:
            self.close()
            raise
        # While one batch runs in every instance the next one gathers behind it: with fewer requests
        # the server's batcher starves, with more they only wait.
        self.in_flight = 2 * max(1, config.max_batch_size) * max(1, instances)

    def _config(self, model: str) -> ModelConfig:
        try:
            self._client.is_server_live(client_timeout=ASK_TIMEOUT_S)
        except InferenceServerException as err:
            raise self._unreachable(err) from err
        try:
            return self._client.get_model_config(model, client_timeout=ASK_TIMEOUT_S).config
        except InferenceServerException as err:
            raise UpscaleError(
                f"the server at {self.address} has not loaded model {model!r} ({err.message()}); "
                "expected the ensemble there: load it, or name another with --model"
            ) from err

    def _unreachable(self, err: InferenceServerException) -> ServerError:
        if speaks_http(self.address):
            return ServerError(
                f"expected gRPC at {self.address}, found HTTP: "
                f"give Triton's gRPC port, usually {DEFAULT_GRPC_PORT}, with --url"
            )
        return ServerError(f"no Triton server answers at {self.address}: {START_HINT} [{err.message()}]")

    def check(self) -> None:
        """Return if the ensemble can be asked now.

        Raises:
            InferenceServerException: It cannot.
            UpscaleError: It no longer answers as it did.
        """
        model = self.contract.model
        if not self._client.is_model_ready(model, client_timeout=ASK_TIMEOUT_S):
            raise InferenceServerException(f"model {model!r} is not ready", status="StatusCode.UNAVAILABLE")
        if self._ring:
            # A server that was started again knows nothing of the old ring; one that was only cut off
            # may still be writing into it.
            self._share_memory(self._ring.lr_shape, self._transport, release_timeout_s=0)
        if self._identity:
            self._ensemble = self._config(model)
            found = self._probe(ASK_TIMEOUT_S)
            difference = self._identity.difference(found)
            if difference:
                raise UpscaleError(
                    f"expected the weights of before at {self.address}, found that it came back with others: "
                    f"{self._identity}, now {found}, {difference}; serve the same model again"
                )

    def identity(self) -> Identity:
        """Tell the weights behind this server from others.

        Raises:
            UpscaleError: There was no answer to the probe.
        """
        if self._identity is None:
            try:
                self._identity = self._probe(PROBE_TIMEOUT_S)
            except InferenceServerException as err:
                raise UpscaleError(
                    f"expected an answer to a small probe from {self.address}, found: {err.message()}; "
                    "see the server's log"
                ) from err
        return self._identity

    def _probe(self, timeout_s: float) -> Identity:
        contract = self.contract
        lr_window = probe_window(contract.window, contract.multiple_of, contract.min_size)
        lr_input = InferInput(contract.input_name, [1, *lr_window.shape], "UINT8")
        lr_input.set_data_from_numpy(lr_window[None])
        result = self._client.infer(contract.model, [lr_input], request_id=PROBE_ID, client_timeout=timeout_s)
        hr, error = self._hr_from_result(result, lr_window.shape, None, 0)
        if hr is None:
            raise error or InferenceServerException("no frame")
        return identity_of(self._ensemble, hr)

    def share_memory(self, lr_shape: tuple[int, ...], transport: str = AUTO) -> str:
        """Pass windows of this shape and their answers through shared memory from now on, if possible.

        Args:
            lr_shape: (T, H, W, 3).
            transport: One of ``transports.TRANSPORTS``.

        Returns:
            How they pass, and why no better way was taken.
        """
        return self._share_memory(lr_shape, transport, RELEASE_TIMEOUT_S)

    def _share_memory(self, lr_shape: tuple[int, ...], transport: str, release_timeout_s: float) -> str:
        self._close_ring(release_timeout_s)
        self._transport = transport
        self._ring, way = ring_for(
            self._client, self.address, self.in_flight, lr_shape, self._hr_shape(lr_shape), transport
        )
        return way

    def ask(self, lr_window: Image, done: Done) -> None:
        """Send one window; ``done`` is called on another thread with the hr frame, or with the error.

        Args:
            lr_window: (T, H, W, 3) uint8 RGB, 0..255, contiguous.
            done: Gets ((H * scale, W * scale, 3) uint8 RGB, None) or (None, error).
        """
        lr_input = InferInput(self.contract.input_name, [1, *lr_window.shape], "UINT8")
        hr_output = InferRequestedOutput(self.contract.output_name)
        ring = self._ring if self._ring and self._ring.lr_shape == lr_window.shape else None
        slot = 0
        if ring:
            try:
                slot = ring.put(lr_window)
            except InferenceServerException as err:
                return done(None, err)
            ring.attach(slot, lr_input, hr_output)
        else:
            lr_input.set_data_from_numpy(lr_window[None])

        call, ended = object(), False

        def answered(result: InferResult | None, error: InferenceServerException | None) -> None:
            nonlocal ended
            ended = True
            self._calls.pop(call, None)
            hr = None
            if result is not None:
                hr, error = self._hr_from_result(result, lr_window.shape, ring, slot)
            if ring:
                ring.free(slot)
            done(hr, error)

        self._calls[call] = self._client.async_infer(
            self.contract.model, [lr_input], answered, outputs=[hr_output]
        )
        if ended:  # before it was entered
            self._calls.pop(call, None)

    def _hr_shape(self, lr_shape: tuple[int, ...]) -> tuple[int, int, int]:
        _, height, width, _ = lr_shape
        return height * self.contract.scale, width * self.contract.scale, 3

    def _hr_from_result(
        self, result: InferResult, lr_shape: tuple[int, ...], ring: Ring | None, slot: int
    ) -> tuple[Image | None, InferenceServerException | None]:
        name, expected = self.contract.output_name, [1, *self._hr_shape(lr_shape)]
        output = result.get_output(name)
        if output is not None and list(output.shape) == expected and output.datatype == "UINT8":
            try:
                return (ring.take(slot) if ring else result.as_numpy(name)[0]), None
            except InferenceServerException as err:
                return None, err
        found = f"{output.datatype} {list(output.shape)}" if output is not None else "nothing"
        return None, InferenceServerException(f"expected {name} UINT8 {expected}, found {found}")

    def _close_ring(self, timeout_s: float) -> None:
        """Let go of shared memory, also of what the server still used when that was tried before."""
        rings = kept_rings(self._client)
        if self._ring:
            rings.append(self._ring)
            self._ring = None
        in_use = [ring for ring in rings if ring.close(timeout_s)]
        if in_use:
            log.warning(
                "%s still uses %d MB of shared memory for requests that were given up; asking again later",
                self.address,
                sum(ring.size_bytes for ring in in_use) >> 20,
            )

    def close(self) -> None:
        """Hang up; requests still under way are cancelled."""
        if self._is_closed:
            return
        self._is_closed = True
        for call in list(self._calls.values()):
            call.cancel()
        self._close_ring(RELEASE_TIMEOUT_S)
        self._client.close()


def speaks_http(address: str) -> bool:
    """Whether a plain web server answers at ``host:port``."""
    try:
        with urllib.request.urlopen(f"http://{address}/v2/health/live", timeout=2):
            return True
    except urllib.error.HTTPError:
        return True  # an error page is an answer too
    except (OSError, ValueError, http.client.HTTPException):  # closed, or speaks something else
        return False
