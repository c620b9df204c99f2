"""Triton's ``onnxruntime`` backend in Python: runs ONNX models with ONNX Runtime.

The embedded server loads this file under the name of NVIDIA's native backend, so one ``config.pbtxt`` serves
both. What is read from the configuration, and how, follows ``src/onnxruntime.cc`` of
triton-inference-server/onnxruntime_backend. Each model instance is a process of its own with one session.

One difference: on a CPU, a batch is run sample by sample. A GPU needs the whole batch to fill its cores; on
a CPU, four samples at once take four times the memory, more than its caches hold. Sample by sample, the
pruned network upscales 20 % more frames in less than half the memory (320x180, two cores, 2026-11-25).
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as pb_utils
from sequences import Sequences

Array = np.ndarray[Any, Any]
Feeds = dict[str, Array]

# `optimization.graph.level` as the native backend reads it (its code, not the comment in model_config.proto).
GRAPH_LEVELS = {
    -1: ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    1: ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    2: ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
}
EXECUTION_MODES = {"0": ort.ExecutionMode.ORT_SEQUENTIAL, "1": ort.ExecutionMode.ORT_PARALLEL}

TRITON_TYPES = {
    "tensor(bool)": "TYPE_BOOL",
    "tensor(uint8)": "TYPE_UINT8",
    "tensor(int8)": "TYPE_INT8",
    "tensor(int32)": "TYPE_INT32",
    "tensor(int64)": "TYPE_INT64",
    "tensor(float16)": "TYPE_FP16",
    "tensor(float)": "TYPE_FP32",
    "tensor(double)": "TYPE_FP64",
}

CPU_PROVIDER = "CPUExecutionProvider"
QUEUE_SIZE = 1000  # messages; the Python backend's default
CHANGED = "expected frames of one size in a sequence, found another; begin a new one with START"
GONE = "the state of this sequence is gone, after an error or a long pause; begin a new one with START"
GPU_PROVIDERS = {"cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}


class ControlBlock(ctypes.Structure):
    """``IPCControlShm`` of triton-inference-server/python_backend (r24.10, src/pb_utils.h), on x86-64."""

    _fields_ = (
        ("is_healthy", ctypes.c_bool), ("flags", ctypes.c_bool * 7), ("mutexes", ctypes.c_char * 80),
        ("requests", ctypes.c_ssize_t),
    )  # fmt: skip


class MessageQueue(ctypes.Structure):
    """``MessageQueueShm`` of the same (src/message_queue.h): a ring buffer of messages."""

    _fields_ = (
        ("semaphores_and_mutex", ctypes.c_char * 104), ("size", ctypes.c_size_t),
        ("buffer", ctypes.c_ssize_t), ("head", ctypes.c_int), ("tail", ctypes.c_int),
    )  # fmt: skip


class RequestGuard:
    """Around the work on a request: keeps Triton waiting for the answer, and notices when it does not.

    Triton 2.51 waits for a second at a time, and gives up on an instance that has not said in that second
    that it is healthy, on a machine that stalls or is paused, or whose clock is set. It answers these
    requests with an error, but then takes the late answer for that to the *next* requests, and reads memory
    that is free by then: first wrong frames, then a crash.

    The stub says that it is healthy every 0.3 s, too seldom for a second that is cut short. So this says it
    more often. When Triton has given up all the same, which leaves a message in the instance's queue, no
    answer may be given any more, and the server ends.
    """

    OBJECT_HEADER_BYTES = 16  # AllocatedShmOwnership, before every object in the region
    REPORT_S = 0.005

    def __init__(self, name: str) -> None:
        """Find what the instance shares with Triton.

        Raises:
            OSError, ValueError, IndexError: This is no instance, or one of another release.
        """
        self._name = name
        arguments = Path("/proc/self/cmdline").read_bytes().decode().split("\0")
        region, self._server, control_handle = arguments[2], int(arguments[5]), int(arguments[7])
        with Path("/dev/shm", region).open("r+b") as file:
            memory = mmap.mmap(file.fileno(), 0)
        self._control = ControlBlock.from_buffer(memory, control_handle + self.OBJECT_HEADER_BYTES)
        self._queue = MessageQueue.from_buffer(memory, self._control.requests + self.OBJECT_HEADER_BYTES)
        if self._queue.size != QUEUE_SIZE or self._is_abandoned():
            raise ValueError(f"a queue of {self._queue.size}")
        self._at_work = threading.Event()
        self._at_work.set()  # until the first answer, for Triton waits in the same way while a model loads
        threading.Thread(target=self._report, daemon=True).start()

    def __enter__(self) -> None:
        """Begin the work."""
        self._end_if_abandoned()
        self._at_work.set()

    def __exit__(self, *_: object) -> None:
        """End the work; the answer follows."""
        self._at_work.clear()
        self._end_if_abandoned()

    def _report(self) -> None:
        while self._at_work.wait():
            self._control.is_healthy = True
            time.sleep(self.REPORT_S)

    def _is_abandoned(self) -> bool:
        """Whether a message waits; the queue is empty as long as Triton waits for an answer."""
        return bool(self._queue.head != self._queue.tail)

    def _end_if_abandoned(self) -> None:
        if not self._is_abandoned():
            return
        sys.stderr.write(
            f"{self._name}: this instance stalled for over a second and Triton gave up on it; its answer "
            "would be taken for that to another request. The server is killed: start it again\n"
        )
        if os.getppid() == self._server:
            os.kill(self._server, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)


class TritonPythonModel:
    """One instance of one model.

    There is no ``auto_complete_config``: Triton does not tell it where the model lies. So ``initialize``
    compares the configuration with the ONNX file; a mismatch fails the load all the same.
    """

    def initialize(self, args: dict[str, str]) -> None:
        """Create the session, and refuse a file that does not fit the configuration.

        Args:
            args: As Triton gives them: the configuration as JSON, and where and on what this instance runs.
        """
        config = json.loads(args["model_config"])
        self.name = config["name"]
        self.guard: AbstractContextManager[None] = nullcontext()
        try:
            self.guard = RequestGuard(self.name)
        except (OSError, ValueError, IndexError) as err:
            pb_utils.Logger.log_warn(f"{self.name}: not guarded against stalls of the machine: {err}")
        self.batches = config["max_batch_size"] > 0
        path = (
            Path(args["model_repository"])
            / args["model_version"]
            / (config["default_model_filename"] or "model.onnx")
        )
        if not path.is_file():
            raise pb_utils.TritonModelException(f"{self.name}: {path} does not exist: run `make export`")
        options = session_options(config, len(os.sched_getaffinity(0)))
        providers = execution_providers(config, args["model_instance_kind"], args["model_instance_device_id"])
        try:
            self.session = ort.InferenceSession(path, options, providers)
        except Exception as err:  # the errors of ONNX Runtime have no narrower common base
            raise pb_utils.TritonModelException(
                f"{self.name}: {path} cannot be loaded ({err}): run `make export` again"
            ) from err
        # What reading the file took is as large as the weights, and would be kept for later.
        ctypes.CDLL(None).malloc_trim(0)
        check_signature(config, self.session)
        self.sequences = Sequences(config, args["model_instance_name"])
        self.outputs = [output["name"] for output in config["output"]]
        self.fetched = [*self.outputs, *self.sequences.outputs]
        self.one_by_one = self.batches and self.session.get_providers()[0] == CPU_PROVIDER
        self.multiple_of = int(config["parameters"].get("multiple_of", {"string_value": "1"})["string_value"])
        self.frames = config["input"][0]
        pb_utils.Logger.log_info(
            f"{self.name} {args['model_instance_name']}: {path.name} on {self.session.get_providers()[0]}, "
            f"{options.intra_op_num_threads} threads"
        )

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer every request, in order; on a GPU, those of equal shape share one run."""
        with self.guard:
            return self._answer_all(requests)

    def _answer_all(self, requests: Sequence[Any]) -> list[Any]:
        feeds = [{tensor.name(): tensor.as_numpy() for tensor in request.inputs()} for request in requests]
        answers = [self._refusal(feed) for feed in feeds]
        for index, request in enumerate(requests):
            before = self.sequences.states(request)
            feeds[index].update(before or {})
            if before is None:
                answers[index] = _refused(f"{self.name}: {GONE}")
        # The dynamic batcher only brings equal shapes together. A model without a batch axis never shares.
        shares = self.batches and not self.one_by_one
        groups: dict[tuple[Any, ...], list[int]] = {}
        for index, feed in enumerate(feeds):
            if answers[index] is None:
                key = tuple((name, array.shape[1:]) for name, array in sorted(feed.items()))
                groups.setdefault(key if shares else (index,), []).append(index)

        states: dict[int, Feeds | None] = {}
        for members in groups.values():
            answered = self._answer([feeds[index] for index in members])
            for index, (answer, after) in zip(members, answered, strict=True):
                answers[index], states[index] = answer, after
        for index, request in enumerate(requests):
            if not self.sequences.keep(request, states.get(index)):
                answers[index] = _refused(f"{self.name}: {CHANGED}")
        return answers

    def _refusal(self, feed: Feeds) -> Any | None:
        """Answer to frames of a size that the network does not take: the parameter ``multiple_of``."""
        name, axes = self.frames["name"], [*([1] if self.batches else []), *self.frames["dims"]]
        shape = feed[name].shape
        sides = [side for side, axis in zip(shape, axes, strict=True) if int(axis) == -1]
        if all(side > 0 and side % self.multiple_of == 0 for side in sides):
            return None
        text = (
            f"{self.name}: expected height and width of {name} in multiples of {self.multiple_of}, found "
            f"{'x'.join(map(str, sides))}: pad the frames, repeating their edges, and crop the answer"
        )
        return _refused(text)

    def _answer(self, feeds: Sequence[Feeds]) -> list[tuple[Any, Feeds | None]]:
        """Responses to requests of one shape, and the states after them, none after an error.

        When their common run fails, each gets a run of its own.
        """
        try:
            results = self._run(feeds)
        except Exception as err:  # whatever goes wrong is the answer to this request, not the server's end
            if len(feeds) > 1:
                return [answer for feed in feeds for answer in self._answer([feed])]
            shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in feeds[0].items())
            error = pb_utils.TritonError(f"{self.name} failed on {shapes}: {err}")
            return [(pb_utils.InferenceResponse(error=error), None)]
        answers: list[tuple[Any, Feeds | None]] = []
        for arrays in results:
            tensors = [pb_utils.Tensor(*named) for named in zip(self.outputs, arrays, strict=False)]
            after = dict(zip(self.sequences.inputs, arrays[len(self.outputs) :], strict=True))
            answers.append((pb_utils.InferenceResponse(tensors), after))
        return answers

    def _run(self, feeds: Sequence[Feeds]) -> list[list[Array]]:
        """One run for all feeds; result per feed, per output, as views where the run was shared."""
        if len(feeds) == 1:
            return [self._run_by_samples(feeds[0]) if self.one_by_one else self._run_at_once(feeds[0])]
        joined = {name: np.concatenate([feed[name] for feed in feeds]) for name in feeds[0]}
        sizes = [len(next(iter(feed.values()))) for feed in feeds]
        arrays = self._run_at_once(joined)
        for name, array in zip(self.fetched, arrays, strict=True):
            if len(array) != sum(sizes):
                raise ValueError(f"output {name} has batch {len(array)} after a run of batch {sum(sizes)}")
        splits = [np.split(array, np.cumsum(sizes)[:-1]) for array in arrays]
        return [list(parts) for parts in zip(*splits, strict=True)]

    def _run_by_samples(self, feed: Feeds) -> list[Array]:
        samples = len(next(iter(feed.values())))
        if samples == 1:
            return self._run_at_once(feed)
        parts = [
            self._run_at_once({name: array[index : index + 1] for name, array in feed.items()})
            for index in range(samples)
        ]
        return [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]

    def _run_at_once(self, feed: Feeds) -> list[Array]:
        arrays: list[Array] = self.session.run(self.fetched, feed)
        return arrays


def _refused(text: str) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(text, pb_utils.TritonError.INVALID_ARG))


def session_options(config: Mapping[str, Any], cores: int) -> ort.SessionOptions:
    """Session options of one instance.

    Args:
        config: The model's configuration.
        cores: CPU cores, shared by the instances of this model where the configuration sets no threads.
    """
    parameters = {key: value["string_value"] for key, value in config.get("parameters", {}).items()}
    options = ort.SessionOptions()

    instances = sum(group["count"] for group in config["instance_group"])
    threads = int(parameters.get("intra_op_thread_count", 0))
    options.intra_op_num_threads = threads if threads > 0 else max(1, cores // instances)
    options.inter_op_num_threads = max(0, int(parameters.get("inter_op_thread_count", 0)))
    mode = parameters.get("execution_mode", "0")
    if mode not in EXECUTION_MODES:
        raise pb_utils.TritonModelException(
            f"{config['name']}: parameter execution_mode is {mode!r}, expected one of {list(EXECUTION_MODES)}"
        )
    options.execution_mode = EXECUTION_MODES[mode]
    # Plans of where tensors lie fit one shape, and are laid out beside the memory already in use: without
    # them the generator takes a quarter less memory, and no more time (320x180, 2026-11-25).
    options.enable_mem_pattern = False
    # Every session that spins while it waits takes the cores that the other instances work on.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")

    level = config.get("optimization", {}).get("graph", {}).get("level", 0)
    options.graph_optimization_level = GRAPH_LEVELS.get(level, ort.GraphOptimizationLevel.ORT_ENABLE_ALL)
    return options


def execution_providers(config: Mapping[str, Any], kind: str, device_id: str) -> list[Any]:
    """ONNX Runtime's providers, best first, for an instance of this kind on this device.

    Args:
        config: The model's configuration; ``optimization.execution_accelerators`` asks for more than CUDA.
        kind: ``GPU`` or ``CPU``, as Triton resolved it.
        device_id: Number of the GPU.
    """
    accelerators = config.get("optimization", {}).get("execution_accelerators", {})
    for wanted in accelerators.get("cpu_execution_accelerator", []):
        pb_utils.Logger.log_warn(f"{config['name']}: CPU accelerator {wanted['name']} is not in this server")
    if kind != "GPU":
        return [CPU_PROVIDER]

    requested = [
        (accelerator["name"], accelerator.get("parameters", {}))
        for accelerator in accelerators.get("gpu_execution_accelerator", [])
    ]
    if "cuda" not in dict(requested):
        requested.append(("cuda", {}))
    providers: list[Any] = []
    for name, parameters in requested:
        if GPU_PROVIDERS.get(name) in ort.get_available_providers():
            providers.append((GPU_PROVIDERS[name], {**parameters, "device_id": device_id}))
        else:
            pb_utils.Logger.log_warn(f"{config['name']}: accelerator {name} is not in this ONNX Runtime")
    return [*providers, CPU_PROVIDER]


def check_signature(config: Mapping[str, Any], session: ort.InferenceSession) -> None:
    """Refuse a configuration whose tensors are not those of the ONNX file.

    As in the native backend, inputs must be the same set, with states and controls of sequences among them,
    outputs may be left out, and an axis that the graph leaves open fits any configured size.
    """
    batch_axis = [-1] if config["max_batch_size"] > 0 else []
    batching = config.get("sequence_batching") or {}
    states = batching.get("state", [])
    configured = {
        kind: [*config[kind], *({**state, "name": state[f"{kind}_name"]} for state in states)]
        for kind in ("input", "output")
    }
    controls = [
        {"name": tensor["name"], "data_type": "TYPE_FP32", "dims": [1]}
        for tensor in batching.get("control_input", [])
    ]
    configured["input"] += controls
    for kind, nodes in (("input", session.get_inputs()), ("output", session.get_outputs())):
        wanted = {
            t["name"]: (t["data_type"], batch_axis + [int(d) for d in t["dims"]]) for t in configured[kind]
        }
        found = {
            node.name: (
                TRITON_TYPES.get(node.type, node.type),
                [d if isinstance(d, int) else -1 for d in node.shape],
            )
            for node in nodes
        }
        fits = set(wanted) == set(found) if kind == "input" else set(wanted) <= set(found)
        fits = fits and all(
            dtype == found[name][0]
            and len(dims) == len(found[name][1])
            and all(have in (-1, want) for want, have in zip(dims, found[name][1], strict=True))
            for name, (dtype, dims) in wanted.items()
        )
        if not fits:
            raise pb_utils.TritonModelException(
                f"{config['name']}: config.pbtxt expects {kind}s {wanted}, the ONNX file has {found}; "
                "run `make export` so that both come from one contract"
            )
