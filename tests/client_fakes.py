"""Stand-ins for the client's tests: a gRPC server that speaks Triton's protocol, and small clips."""

from __future__ import annotations

import base64
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import av
import grpc
import numpy as np
from click.testing import CliRunner, Result
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc

from mst_gan_client.cli import main
from mst_gan_client.video.encode import same_scheduling

LOSSLESS = ("--codec", "ffv1", "--pix-fmt", "bgr0")  # options of the client

PARAMETERS = {
    "scale": "4",
    "window": "3",
    "multiple_of": "4",
    "min_size": "16x16",
    "max_size": "720x1280",
}


def ensemble_config(**changes: str) -> model_config_pb2.ModelConfig:
    """The config of an ensemble, some of its parameters changed."""
    config = model_config_pb2.ModelConfig(name="mst_gan", platform="ensemble", max_batch_size=4)
    config.input.add(name="lr_window", data_type=model_config_pb2.TYPE_UINT8, dims=[3, -1, -1, 3])
    config.output.add(name="hr_frame", data_type=model_config_pb2.TYPE_UINT8, dims=[-1, -1, 3])
    for name, value in {**PARAMETERS, **changes}.items():
        config.parameters[name].string_value = value
    for stage in ("flow_align", "generator", "pixel_shuffle"):
        config.ensemble_scheduling.step.add(model_name=stage, model_version=-1)
    return config


def stage_config(name: str) -> model_config_pb2.ModelConfig:
    """The config of a composing model: two instance groups of one."""
    config = model_config_pb2.ModelConfig(name=name, max_batch_size=4)
    for group in ("stream_0", "stream_1"):
        config.instance_group.add(name=group, count=1)
    return config


def nearest(windows: np.ndarray) -> np.ndarray:
    """(N, 3, H, W, 3) -> (N, 4H, 4W, 3): the center frame, every pixel four times each way."""
    return windows[:, 1].repeat(4, axis=1).repeat(4, axis=2)


def sum_of_window(windows: np.ndarray) -> np.ndarray:
    """Like ``nearest``, but every frame of the window counts, with another weight each."""
    mixed = windows[:, 0] // 4 + windows[:, 1] // 2 + windows[:, 2] // 8
    return mixed.repeat(4, axis=1).repeat(4, axis=2)


class FakeCuda(ModuleType):
    """As much of tritonclient's CUDA shared memory as the client uses; its GPU is a dictionary."""

    class CudaSharedMemoryException(Exception):  # noqa: N818
        pass

    def __init__(self) -> None:
        super().__init__("tritonclient.utils.cuda_shared_memory")
        self.regions: dict[str, bytearray] = {}
        self.room = 1 << 30
        self.failing: str | None = None
        """Name of a function that fails."""

    def _trip(self, name: str) -> None:
        if self.failing == name:
            raise self.CudaSharedMemoryException("unable to do it") from Exception(b"no CUDA-capable device")

    def create_shared_memory_region(self, name: str, size: int, device: int) -> str:
        self._trip("create")
        assert device == 0 and name not in self.regions
        self.regions[name] = bytearray(size)
        if sum(map(len, self.regions.values())) > self.room:
            del self.regions[name]
            raise self.CudaSharedMemoryException("unable to do it") from Exception(b"out of memory")
        return name

    def get_raw_handle(self, handle: str) -> bytes:
        return base64.b64encode(handle.encode())

    def set_shared_memory_region(self, handle: str, arrays: list[np.ndarray]) -> None:
        self._trip("set")
        data = b"".join(array.tobytes() for array in arrays)
        self.regions[handle][: len(data)] = data

    def get_contents_as_numpy(self, handle: str, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
        self._trip("get")
        return np.frombuffer(bytes(self.regions[handle]), dtype).reshape(shape)

    def destroy_shared_memory_region(self, handle: str) -> None:
        del self.regions[handle]


@dataclass(eq=False)
class FakeTriton(service_pb2_grpc.GRPCInferenceServiceServicer):
    """As much of Triton as the client talks to, in this process."""

    network: Callable[[np.ndarray], np.ndarray] = nearest
    config: model_config_pb2.ModelConfig = field(default_factory=ensemble_config)
    before_answer: Callable[[int], None] = lambda count: None
    """Called with the number of the request, counted from 1, before it is answered."""
    refusal: tuple[grpc.StatusCode, str] | None = None
    """While it is set: not ready, and how every request for inference is refused."""
    failure: Callable[[int], tuple[grpc.StatusCode, str] | None] = lambda count: None
    """How a request for inference fails, by its number, or 0 for the probe; the server stays ready."""
    cuda: FakeCuda | None = None
    """The GPU that is shared with clients."""
    cuda_names: set[str] = field(default_factory=set)
    """Regions registered now."""
    names_in_use: set[str] = field(default_factory=set)
    """Regions that it refuses to let go of."""
    refused_unregister: int = 0
    cuda_requests: int = 0
    certificate: tuple[bytes, bytes] | None = None
    """Key and certificate: speak TLS."""
    headers: list[dict[str, str]] = field(default_factory=list)
    """Of every request for inference."""
    host: str = "127.0.0.1"
    port: int = 0
    probes: int = 0
    requests: int = 0
    ids: set[str] = field(default_factory=set)
    """Of requests for inference. A window that is sent again keeps its id."""
    under_way: int = 0
    most_under_way: int = 0
    shapes: list[tuple[int, ...]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._used: list[str] = []
        self.started_ns = time.time_ns()
        self.start()

    def start(self) -> None:
        options = [("grpc.max_receive_message_length", -1), ("grpc.so_reuseport", 0)]
        self._server = grpc.server(ThreadPoolExecutor(32), options=options)
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self, self._server)
        address = f"{self.host}:{self.port}"
        if self.certificate:
            credentials = grpc.ssl_server_credentials([self.certificate])
            self.port = self._server.add_secure_port(address, credentials)
        else:
            self.port = self._server.add_insecure_port(address)
        self._server.start()

    def stop(self) -> None:
        """Go away at once, in the middle of whatever there is."""
        self._server.stop(grace=0).wait()

    @property
    def url(self) -> str:
        return f"{self.host}:{self.port}"

    def __enter__(self) -> FakeTriton:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def ServerLive(self, request, context):  # noqa: N802
        return service_pb2.ServerLiveResponse(live=True)

    def ModelReady(self, request, context):  # noqa: N802
        if self.refusal:
            context.abort(grpc.StatusCode.UNAVAILABLE, "Server not ready")
        return service_pb2.ModelReadyResponse(ready=request.name == self.config.name)

    def ModelConfig(self, request, context):  # noqa: N802
        steps = {step.model_name for step in self.config.ensemble_scheduling.step}
        if request.name == self.config.name:
            return service_pb2.ModelConfigResponse(config=self.config)
        if request.name in steps:
            return service_pb2.ModelConfigResponse(config=stage_config(request.name))
        context.abort(grpc.StatusCode.NOT_FOUND, f"Request for unknown model: '{request.name}' is not found")

    def ModelInfer(self, request, context):  # noqa: N802
        if request.id == "probe":
            self.probes += 1
            self._fail(0, context)
            return self._answer(request)
        with self._lock:
            self.requests += 1
            count = self.requests
            self.ids.add(request.id)
            used = [
                tensor.parameters["shared_memory_region"].string_param
                for tensor in (*request.inputs, *request.outputs)
                if "shared_memory_region" in tensor.parameters
            ]
            self._used += used
            self.under_way += 1
            self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            shape = tuple(request.inputs[0].shape)
            self.shapes.append(shape)
            self.headers.append(dict(context.invocation_metadata()))
            self.before_answer(count)
            if self.refusal:
                context.abort(*self.refusal)
            self._fail(count, context)
            return self._answer(request)
        finally:
            with self._lock:
                self.under_way -= 1
                for name in used:
                    self._used.remove(name)

    def _fail(self, count, context):
        failure = self.failure(count)
        if failure:
            context.abort(*failure)

    def ModelStatistics(self, request, context):  # noqa: N802
        response = service_pb2.ModelStatisticsResponse()
        stats = response.model_stats.add(name=request.name, inference_count=self.probes + self.requests)
        stats.inference_stats.success.ns = self.started_ns
        return response

    def CudaSharedMemoryStatus(self, request, context):  # noqa: N802
        response = service_pb2.CudaSharedMemoryStatusResponse()
        for name in self.cuda_names:
            response.regions[name].name = name
        return response

    def CudaSharedMemoryRegister(self, request, context):  # noqa: N802
        if not self.cuda or len(self.cuda.regions.get(request.raw_handle.decode(), "")) != request.byte_size:
            message = "failed to register shared memory region: invalid args"
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, message)
        self.cuda_names.add(request.name)
        return service_pb2.CudaSharedMemoryRegisterResponse()

    def CudaSharedMemoryUnregister(self, request, context):  # noqa: N802
        if request.name in self.names_in_use or request.name in self._used:
            self.refused_unregister += 1
            message = f"Cannot unregister shared memory region '{request.name}', it is currently in use."
            context.abort(grpc.StatusCode.INTERNAL, message)
        self.cuda_names.discard(request.name)
        return service_pb2.CudaSharedMemoryUnregisterResponse()

    def _region(self, tensor) -> bytearray:
        name = tensor.parameters["shared_memory_region"].string_param
        assert name in self.cuda_names
        region = self.cuda.regions[name]
        assert len(region) == tensor.parameters["shared_memory_byte_size"].int64_param
        return region

    def _answer(self, request):
        shared = not request.raw_input_contents
        data = self._region(request.inputs[0]) if shared else request.raw_input_contents[0]
        windows = np.frombuffer(bytes(data), np.uint8).reshape(request.inputs[0].shape)
        hr = np.ascontiguousarray(self.network(windows))
        response = service_pb2.ModelInferResponse(model_name=request.model_name)
        response.outputs.add(name="hr_frame", datatype="UINT8", shape=hr.shape)
        if shared:
            self.cuda_requests += 1
            self._region(request.outputs[0])[:] = hr.tobytes()
        else:
            response.raw_output_contents.append(hr.tobytes())
        return response


def pictures(count: int, height: int = 32, width: int = 48) -> list[np.ndarray]:
    """Frames that differ from each other and from their mirror images."""
    y, x = np.mgrid[0:height, 0:width]
    return [
        np.stack([(x * 4 + 3 * t) % 256, (y * 5 + 2 * t) % 256, (x + y + 4 * t) % 256], -1).astype(np.uint8)
        for t in range(count)
    ]


def write_clip(
    path: Path,
    images: Sequence[np.ndarray],
    *,
    rate: Fraction | int = 25,
    codec: str = "libx264",
    pix_fmt: str = "yuv444p",
    pts: Sequence[int] | None = None,
    time_base: Fraction | None = None,
    audio: bool = False,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
) -> Path:
    """Encode images to a clip; with ``pts`` at any times, with ``audio`` a tone as long as it."""
    rate = Fraction(rate)
    time_base = time_base or 1 / rate
    with av.open(path, "w", container_options=container_options) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt = pix_fmt
        stream.codec_context.time_base = time_base
        sound = container.add_stream("aac", rate=48000, layout="stereo") if audio else None
        for i, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format=pix_fmt)
            frame.pts, frame.time_base = (pts[i] if pts else i), time_base
            with same_scheduling() if i == 0 else nullcontext():
                container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if sound:
            for start in range(0, int(len(images) / rate * 48000), 1024):
                wave = np.sin(np.arange(start, start + 1024) / 20).astype(np.float32)
                tone = av.AudioFrame.from_ndarray(np.stack([wave, -wave]), format="fltp", layout="stereo")
                tone.sample_rate, tone.pts, tone.time_base = 48000, start, Fraction(1, 48000)
                container.mux(sound.encode(tone))
            container.mux(sound.encode(None))
    return path


def decoded(path: Path, pix_fmt: str = "rgb24") -> list[np.ndarray]:
    """All frames of a clip."""
    with av.open(path) as container:
        return [frame.to_ndarray(format=pix_fmt) for frame in container.decode(video=0)]


def frame_times(path: Path) -> list[Fraction]:
    """Presentation times of a clip's frames, in seconds, exactly."""
    with av.open(path) as container:
        return [frame.pts * frame.time_base for frame in container.decode(video=0)]


def packets(path: Path, kind: str) -> list[bytes]:
    """The packets of a clip's first stream of a kind."""
    with av.open(path) as container:
        stream = next(s for s in container.streams if s.type == kind)
        return [bytes(packet) for packet in container.demux(stream) if packet.size]


@contextmanager
def http_server(port: int = 0) -> Iterator[int]:
    """A plain web server; yields its port."""
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Quiet(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", port), Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()


def run_client(*arguments: object) -> Result:
    """Run the client's command in this process."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])
