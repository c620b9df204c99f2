"""Times one network in one runtime: seconds per frame, and the memory it took."""

from __future__ import annotations

import resource
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import onnxruntime
import torch

from perf import clip
from perf.clip import Size
from perf.peers.rows import ROWS, Row

PROBE: Size = (48, 80)  # tells how long the real size would take
OPSET = 18
EAGER, ONNX = "PyTorch", "ONNX Runtime"
ON_GPU = ("PyTorch FP32", "PyTorch TF32", "PyTorch FP16", "torch.compile FP16")
Run = Callable[[], object]


def measure(
    name: str, runtime: str, size: Size, limit_s: float, rounds: int, threads: int, device: str = ""
) -> dict[str, Any]:
    """Time one network; where one run on a CPU would take longer than ``limit_s``, on a smaller frame.

    ``device`` is PyTorch's name of one; by default a runtime ``ON_GPU`` has the GPU, another the CPU.
    """
    row = ROWS[name]
    device = device or ("cuda" if runtime in ON_GPU else "cpu")
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)  # untrained recurrences fade into denormals, which no trained one does
    torch.manual_seed(0)
    network = row.build().eval()
    with torch.inference_mode():
        measured = size
        # On a GPU no row is too slow, and every size is compiled anew.
        probe_s = 0.0
        if device == "cpu":
            probe_s = min(_seconds(run) for run in _runs(row, network, runtime, PROBE, threads, 2, device))
        while probe_s * _area(measured) / _area(PROBE) > limit_s and _area(measured) > _area(PROBE):
            measured = _half(measured)
        seconds: list[float] = []
        for run in _runs(row, network, runtime, measured, threads, rounds + 1, device):
            seconds.append(_seconds(run))
            if sum(seconds) > limit_s:
                break
        del seconds[: len(seconds) > 1]  # the first run of a size also chooses kernels and takes memory
    return {
        "network": name,
        "runtime": runtime,
        "size": list(measured),
        "ms_per_frame": [1000 * second / row.answers for second in seconds],
        "frames_given": row.frames,
        "frames_answered": row.answers,
        "peak_memory_mb": _peak_memory_mb(device),
    }


def _runs(
    row: Row, network: torch.nn.Module, runtime: str, size: Size, threads: int, times: int, device: str
) -> Iterator[Run]:
    """The same run so many times; what it needs is prepared before the first."""
    inputs = row.inputs(clip.read_frames(row.frames, size))
    if runtime == ONNX:
        session = _session(network, inputs, threads)
        feeds = {session.get_inputs()[0].name: inputs.numpy()}
        yield from [lambda: session.run(None, feeds)] * times
        return
    if runtime in ON_GPU:
        network, inputs = network.to(device), inputs.to(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = runtime != ON_GPU[0]
        if runtime == ON_GPU[3]:
            network = torch.compile(network)  # type: ignore[assignment]  # it is called the same way
    is_half = runtime.endswith("FP16")

    def run() -> None:
        with torch.autocast(inputs.device.type, torch.float16) if is_half else nullcontext():
            network(inputs)
        if inputs.is_cuda:
            torch.cuda.synchronize()

    if inputs.is_cuda:
        run()  # compiles, and chooses kernels
    yield from [run] * times


def _session(network: torch.nn.Module, inputs: torch.Tensor, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "network.onnx")
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # the tracer fixes sizes, which are fixed here, and is the old exporter
            torch.onnx.export(network, (inputs,), path, opset_version=OPSET, dynamo=False)
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _seconds(run: Run) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _peak_memory_mb(device: str) -> float:
    """Of the GPU, or of this process with all its libraries."""
    if device != "cpu":
        return round(torch.cuda.max_memory_allocated() / 2**20, 1)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


def _area(size: Size) -> int:
    return size[0] * size[1]


def _half(size: Size) -> Size:
    height, width = (side // 8 * 4 for side in size)  # multiples of 4, as all of them need
    return height, width
