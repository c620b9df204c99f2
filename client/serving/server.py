"""One Triton server: its contract, read from its own config, and asynchronous inference over gRPC."""

from __future__ import annotations

import atexit
import logging
import threading
import time

import grpc
from tritonclient.grpc import (
    InferenceServerClient,
    InferInput,
    InferRequestedOutput,
    InferResult,
)
from tritonclient.grpc.model_config_pb2 import ModelConfig
from tritonclient.utils import InferenceServerException

from ..errors import ServerError, UpscaleError
from ..frames.sequences import FrameSequence
from ..frames.windows import Image
from .addresses import DEFAULT_GRPC_PORT, Address, address_from_url
from .awake import answer_of, awake_s
from .channel import CHANNEL_OPTIONS
from .contract import contract_from_config, instance_count
from .faults import Fault, as_server_error, fault_of
from .identity import Identity, identity_of
from .probe import PROBE_ID, probe_window, speaks_http
from .security import Security
from .sequence import Cancel, Done, SequenceCall
from .trail import NO_TAG, Tag, new_sequence_id
from .transports import AUTO, GRPC, ring_for
from .transports.ring import RELEASE_TIMEOUT_S, Ring, kept_rings

ASK_TIMEOUT_S = 20.0  # for questions about health and configuration: cheap, but the network may be slow
PROBE_TIMEOUT_S = 300.0  # the window is tiny, but may wait behind the frames of others
PROBE_AGAIN_TIMEOUT_S = 60.0  # of a server that was lost
STOP_WATCHING_S = 0.5  # gRPC's thread looks every 0.2 s whether somebody wants it to watch
NO_SECURITY = Security()
UNKNOWN_MODEL = ("StatusCode.NOT_FOUND", "StatusCode.INVALID_ARGUMENT")

START_HINT = "start one with `make serve`, or name another with --url"

log = logging.getLogger(__name__)


class NotLoadedError(ServerError):
    """A server answers, and does not have the model."""


class Server:
    """One Triton server that serves the ensemble.

    Args:
        url: As ``address_from_url`` reads it, or the address itself.
        models: Names of the ensemble; of several, the first that the server has.
        security: For ``grpcs://`` addresses.

    Raises:
        ServerError: No server answers there, or it has not loaded the ensemble.
        UpscaleError: It serves something else.
    """

    in_flight: int
    """Requests that keep this server busy."""
    probe_s: float
    """How long it took to answer the probe, once ``identity`` is known."""

    def __init__(
        self, url: str | Address, models: str | tuple[str, ...], security: Security = NO_SECURITY
    ) -> None:
        address = url if isinstance(url, Address) else Address(*address_from_url(url))
        self.address = address.host_port
        self._is_closed = False
        self._ring: Ring | None = None
        self._calls: dict[object, Cancel] = {}
        """Requests under way, each with what cancels it."""
        self._transport = AUTO
        self._identity: Identity | None = None
        self._ring_lock = threading.Lock()
        if not address.tls:
            security.refuse_in_the_clear(self.address)
        self._credentials = security.credentials() if address.tls else None
        self._options: list[tuple[str, str | int]] = list(CHANNEL_OPTIONS)
        if address.name:
            self._options += [("grpc.ssl_target_name_override", address.name)] if address.tls else []
            self._options += [("grpc.default_authority", address.name)]
        self._breaks = 0
        """How often the connection broke; what is behind the address may have been replaced."""
        self._breaks_checked = 0
        self._client = self._dial()
        atexit.register(self.close)  # later, gRPC would wait for its thread, which no longer runs
        try:
            self._ensemble = config = self._first_config((models,) if isinstance(models, str) else models)
            self.contract = contract_from_config(config, self.address)
            steps = {step.model_name for step in config.ensemble_scheduling.step} or {config.name}
            stages = [self._config(step) for step in steps]
        except BaseException:
            self.close()
            raise
        instances = max(1, min(map(instance_count, stages)))
        if not self.contract.is_recurrent:
            # While one batch runs in every instance the next one gathers behind it: with fewer requests
            # the server's batcher starves, with more they only wait.
            self.in_flight = 2 * max(1, config.max_batch_size) * instances
        else:  # sequences, whose states the server has to hold
            self.in_flight = max(1, *(stage.max_batch_size for stage in stages)) * instances

    def _dial(self) -> InferenceServerClient:
        client = InferenceServerClient(self.address, creds=self._credentials, channel_args=self._options)
        self._was_ready = False
        client._channel.subscribe(self._state_changed)
        return client

    def _state_changed(self, state: grpc.ChannelConnectivity) -> None:
        if state is grpc.ChannelConnectivity.READY:
            self._was_ready = True
        elif self._was_ready:
            self._was_ready = False
            self._breaks += 1

    def _hang_up(self, client: InferenceServerClient) -> None:
        """Close a connection, once gRPC's thread has stopped to watch it: it would end with a traceback."""
        channel, until_s = client._channel, time.monotonic() + STOP_WATCHING_S
        channel.unsubscribe(self._state_changed)
        while channel._connectivity_state.polling and time.monotonic() < until_s:
            time.sleep(0.01)
        client.close()

    def _first_config(self, models: tuple[str, ...]) -> ModelConfig:
        """Of the first of these models that the server has."""
        for model in models[:-1]:
            try:
                return self._config(model)
            except NotLoadedError:
                continue
        return self._config(models[-1])

    def _config(self, model: str) -> ModelConfig:
        try:
            answer_of(lambda: self._client.is_server_live(client_timeout=ASK_TIMEOUT_S))
        except InferenceServerException as err:
            raise self._unreachable(err) from err
        try:
            return self._model_config(model)
        except InferenceServerException as err:
            kind = NotLoadedError if err.status() in UNKNOWN_MODEL else ServerError
            raise kind(
                f"the server at {self.address} has not loaded model {model!r} ({err.message()}); "
                "expected the ensemble there: load it, or name another with --model"
            ) from err

    def _model_config(self, model: str) -> ModelConfig:
        return answer_of(lambda: self._client.get_model_config(model, client_timeout=ASK_TIMEOUT_S)).config

    def _unreachable(self, err: InferenceServerException) -> UpscaleError:
        if speaks_http(self.address):
            return UpscaleError(
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
        model, breaks = self.contract.model, self._breaks
        try:
            is_ready = answer_of(lambda: self._client.is_model_ready(model, client_timeout=ASK_TIMEOUT_S))
        except InferenceServerException as err:
            if err.status() == "StatusCode.DEADLINE_EXCEEDED":
                # A connection that something on the way holds open looks well to gRPC: hang up, dial again.
                with self._ring_lock:
                    given_up, self._client = self._client, self._dial()
                    self._hang_up(given_up)
                    for ring in [*kept_rings(given_up), *([self._ring] if self._ring else [])]:
                        ring.client = self._client
            raise
        if not is_ready:
            raise InferenceServerException(f"model {model!r} is not ready", status="StatusCode.UNAVAILABLE")
        self._ensemble = self._model_config(model)
        if self.contract != (found := contract_from_config(self._ensemble, self.address)):
            raise UpscaleError(
                f"expected the model of before at {self.address}, found that it came back with another: "
                f"{self.contract}, now {found}; serve the same model again"
            )
        if self._ring:
            # A server that was started again knows nothing of the old ring; one that was only cut off
            # may still be writing into it.
            self._share_memory(self._ring.lr_shape, self._transport, release_timeout_s=0)
        if self._identity:
            identity = self._probe(PROBE_AGAIN_TIMEOUT_S)
            difference = self._identity.difference(identity)
            if difference:
                raise UpscaleError(
                    f"expected the weights of before at {self.address}, found that it came back with others: "
                    f"{self._identity}, now {identity}, {difference}; serve the same model again"
                )
        if breaks != self._breaks:
            raise _connection_broke()
        self._breaks_checked = breaks

    def identity(self) -> Identity:
        """Tell the weights behind this server from others.

        Raises:
            ServerError: There was no answer to the probe.
        """
        if self._identity is None:
            started_s = awake_s()
            try:
                self._identity = self._probe(PROBE_TIMEOUT_S)
            except InferenceServerException as err:
                raise ServerError(
                    f"expected an answer to a small probe from {self.address}, found: {err.message()}; "
                    "see the server's log"
                ) from err
            self.probe_s = awake_s() - started_s
        return self._identity

    def _probe(self, timeout_s: float) -> Identity:
        lr_window = probe_window(self.contract)
        lr = self._batch_of_one(lr_window)
        lr_input = InferInput(self.contract.input_name, lr.shape, "UINT8")
        lr_input.set_data_from_numpy(lr)
        model, is_recurrent = self.contract.model, self.contract.is_recurrent
        result = answer_of(
            lambda: self._client.infer(
                model,
                [lr_input],
                request_id=PROBE_ID,
                client_timeout=timeout_s,
                sequence_id=new_sequence_id() if is_recurrent else 0,
                sequence_start=is_recurrent,
                sequence_end=is_recurrent,
            )
        )
        return identity_of(self._ensemble, self._hr_from_result(result, lr_window.shape, None, 0))

    def _batch_of_one(self, lr_window: Image) -> Image:
        """(T, H, W, 3) in the shape of the ensemble's input: a recurrent one takes a frame, not a window."""
        return lr_window if self.contract.is_recurrent else lr_window[None]

    def counters(self) -> bytes | None:
        """What the server has counted of the ensemble so far, to the nanosecond; None: it does not tell.

        Two addresses at which they are equal, and not zero, lead to one server.
        """
        try:
            found = self._client.get_inference_statistics(self.contract.model, client_timeout=ASK_TIMEOUT_S)
        except InferenceServerException:
            return None
        if not any(model.inference_stats.success.ns for model in found.model_stats):
            return None
        return bytes(found.SerializeToString(deterministic=True))

    def share_memory(self, lr_shape: tuple[int, ...], transport: str = AUTO) -> str:
        """Pass windows of this shape and their answers through shared memory from now on, if possible.

        Args:
            lr_shape: (T, H, W, 3).
            transport: One of ``transports.TRANSPORTS``.

        Returns:
            How they pass, and why no better way was taken.

        Raises:
            UpscaleError: Of shared memory, for a model that keeps a state.
        """
        if self.contract.is_recurrent:
            if transport not in (AUTO, GRPC):
                raise UpscaleError(
                    f"expected --transport {AUTO} or {GRPC} for {self.contract.model}, found {transport}: "
                    "sequences pass through gRPC alone; --mode window knows shared memory"
                )
            return "gRPC, in sequences"
        return self._share_memory(lr_shape, transport, RELEASE_TIMEOUT_S)

    def _share_memory(self, lr_shape: tuple[int, ...], transport: str, release_timeout_s: float) -> str:
        with self._ring_lock:
            self._close_ring(release_timeout_s)
            self._transport = transport
            self._ring, way = ring_for(
                self._client, self.address, self.in_flight, lr_shape, self._hr_shape(lr_shape), transport
            )
            return way

    def ask(self, work: Image | FrameSequence, done: Done, tag: Tag = NO_TAG) -> Cancel:
        """Send one window, or a sequence; ``done`` is called once, on any thread.

        Args:
            work: (T, H, W, 3) uint8 RGB, 0..255, contiguous; for a recurrent model one frame of a sequence
                that ``tag`` names, or a sequence.
            done: Gets (hr, None) or (None, error), whatever goes wrong. hr is (H * scale, W * scale, 3)
                uint8 RGB, of a sequence with an axis of frames before.
            tag: What goes with it.

        Returns:
            What lets the server know that nobody wants the answer.
        """
        if isinstance(work, FrameSequence):
            return SequenceCall(self.ask, work, done, tag).begin()
        try:
            return self._send(work, done, tag)
        except Exception as err:  # nothing may be lost, whatever a library raises
            done(None, as_server_error(err))
            return _nothing_to_cancel

    def _send(self, lr_window: Image, done: Done, tag: Tag) -> Cancel:
        breaks = self._breaks
        if breaks != self._breaks_checked:
            raise _connection_broke()
        lr = self._batch_of_one(lr_window)
        lr_input = InferInput(self.contract.input_name, lr.shape, "UINT8")
        hr_output = InferRequestedOutput(self.contract.output_name)
        ring = self._ring if self._ring and self._ring.lr_shape == lr_window.shape else None
        slot = 0
        if ring:
            try:
                slot = ring.put(lr_window)
            except (
                IndexError
            ):  # every slot is in use, as when answers are late that nobody waits for any more
                ring = None
        if ring:
            ring.attach(slot, lr_input, hr_output)
        else:
            lr_input.set_data_from_numpy(lr)

        call, ended = object(), False

        def answered(result: InferResult | None, error: InferenceServerException | None) -> None:
            nonlocal ended
            ended = True
            self._calls.pop(call, None)
            hr = None
            if result is not None and breaks != self._breaks:
                # gRPC connects again by itself: this may come from a server that nobody has checked.
                result, error = None, _connection_broke()
            try:
                try:
                    if result is not None:
                        hr = self._hr_from_result(result, lr_window.shape, ring, slot)
                finally:
                    if ring and error and fault_of(error) is Fault.LOST:
                        ring.retire(slot)  # cancelled or cut off, the server may still be at work on it
                    elif ring:
                        ring.free(slot)
            except Exception as err:  # gRPC would log it, and the window would wait forever
                hr, error = None, as_server_error(err)
            done(hr, error)

        cancel: Cancel = self._client.async_infer(
            self.contract.model,
            [lr_input],
            answered,
            outputs=[hr_output],
            request_id=tag.request_id,
            priority=tag.priority,
            sequence_id=tag.sequence,
            sequence_start=tag.is_start,
            sequence_end=tag.is_end,
            headers=tag.headers,
        ).cancel
        self._calls[call] = cancel
        if ended:  # before it was entered
            self._calls.pop(call, None)
        return cancel

    def _hr_shape(self, lr_shape: tuple[int, ...]) -> tuple[int, int, int]:
        _, height, width, _ = lr_shape
        return height * self.contract.scale, width * self.contract.scale, 3

    def _hr_from_result(
        self, result: InferResult, lr_shape: tuple[int, ...], ring: Ring | None, slot: int
    ) -> Image:
        name, expected = self.contract.output_name, [1, *self._hr_shape(lr_shape)]
        output = result.get_output(name)
        if output is None or list(output.shape) != expected or output.datatype != "UINT8":
            found = f"{output.datatype} {list(output.shape)}" if output is not None else "nothing"
            raise InferenceServerException(f"expected {name} UINT8 {expected}, found {found}")
        hr: Image = ring.take(slot) if ring else result.as_numpy(name)[0]
        return hr

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
        atexit.unregister(self.close)
        for cancel in list(self._calls.values()):
            cancel()
        with self._ring_lock:
            self._close_ring(RELEASE_TIMEOUT_S)
            self._hang_up(self._client)


def _nothing_to_cancel() -> None:
    pass


def _connection_broke() -> InferenceServerException:
    return InferenceServerException("the connection broke", status="StatusCode.UNAVAILABLE")
