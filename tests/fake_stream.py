"""A gRPC server that speaks Triton's protocol for an ensemble with a state, in this process."""

from __future__ import annotations

from dataclasses import dataclass, field

import grpc
import numpy as np
from client_fakes import PARAMETERS, FakeTriton, stage_config
from toy_stream import history
from tritonclient.grpc import model_config_pb2, service_pb2

WARMUP = 4
SLOTS = 64


def stream_config() -> model_config_pb2.ModelConfig:
    """The config of a streaming ensemble."""
    config = model_config_pb2.ModelConfig(name="mst_gan_stream", platform="ensemble", max_batch_size=1)
    config.input.add(name="lr_frame", data_type=model_config_pb2.TYPE_UINT8, dims=[-1, -1, 3])
    config.output.add(name="hr_frame", data_type=model_config_pb2.TYPE_UINT8, dims=[-1, -1, 3])
    parameters = {**PARAMETERS, "warmup": str(WARMUP), "lookahead": "0", "max_sequences": "16"}
    del parameters["window"]
    for name, value in parameters.items():
        config.parameters[name].string_value = value
    for stage in ("stream_align", "stream_generator", "pixel_shuffle"):
        config.ensemble_scheduling.step.add(model_name=stage, model_version=-1)
    return config


@dataclass(eq=False)
class FakeStream(FakeTriton):
    """Answers as ``history`` does, and refuses what Triton's sequence batcher refuses."""

    config: model_config_pb2.ModelConfig = field(default_factory=stream_config)
    also: model_config_pb2.ModelConfig | None = None
    """Another ensemble that it has."""
    states: dict[int, list[np.ndarray]] = field(default_factory=dict)
    """Sequence id -> its frames so far."""
    begun: list[int] = field(default_factory=list)
    """Ids of all sequences, in the order in which they started."""
    clashes: int = 0
    """Sequences that started on an id that was in use, and requests that overtook others."""
    busy: set[int] = field(default_factory=set)
    forgotten: set[int] = field(default_factory=set)

    def forget(self) -> None:
        """Lose all states after the requests under way, as a server does that is started again."""
        with self._lock:
            self.forgotten |= self.states.keys()

    def ModelConfig(self, request, context):  # noqa: N802
        if self.also and request.name == self.also.name:
            return service_pb2.ModelConfigResponse(config=self.also)
        if self.also and request.name in {step.model_name for step in self.also.ensemble_scheduling.step}:
            return service_pb2.ModelConfigResponse(config=stage_config(request.name))
        return super().ModelConfig(request, context)

    def ModelInfer(self, request, context):  # noqa: N802
        if self._is_of_windows(request):
            return super().ModelInfer(request, context)
        key = request.parameters["sequence_id"].int64_param
        starts = request.parameters["sequence_start"].bool_param
        with self._lock:
            self.clashes += key in self.busy or (starts and key in self.begun)
            self.busy.add(key)
            if starts:
                self.begun += [key] if request.id != "probe" else []
                self.states[key] = []
            if key in self.forgotten:
                self.states.pop(key, None)
            known = key in self.states
        try:
            if not key or not known:
                context.abort(
                    grpc.StatusCode.INVALID_ARGUMENT,
                    f"in ensemble 'mst_gan_stream', inference request for sequence {key} to model "
                    "'stream_align' must specify the START flag on the first request of the sequence",
                )
            return super().ModelInfer(request, context)
        finally:
            with self._lock:
                self.busy.discard(key)
                if request.parameters["sequence_end"].bool_param:
                    self.states.pop(key, None)

    def _is_of_windows(self, request):
        return self.also is not None and request.model_name == self.also.name

    def _answer(self, request):
        if self._is_of_windows(request):
            return super()._answer(request)
        data, shape = request.raw_input_contents[0], request.inputs[0].shape
        frames = self.states[request.parameters["sequence_id"].int64_param]
        frames.append(np.frombuffer(data, np.uint8).reshape(shape)[0])
        hr = list(history(frames))[-1][None]
        response = service_pb2.ModelInferResponse(model_name=request.model_name)
        response.outputs.add(name="hr_frame", datatype="UINT8", shape=hr.shape)
        response.raw_output_contents.append(np.ascontiguousarray(hr).tobytes())
        return response
