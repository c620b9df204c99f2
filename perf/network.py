"""PyTorch networks: counted without computing, and timed in a process of their own."""

from __future__ import annotations

import pickle
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from perf.clips import Frames, Size, read_frames
from perf.machine import ROOT
from perf.results import PerfError, Row

PROBE: Size = (48, 80)  # tells how long the real size would take
EAGER, COMPILED = "PyTorch FP32", "torch.compile FP16"
ON_GPU = (EAGER, "PyTorch TF32", "PyTorch FP16", COMPILED)


@dataclass(frozen=True)
class Network:
    """A network that takes a clip or a window, and how many frames go in and come out."""

    build: Callable[[], nn.Module]  # can be pickled
    frames: int  # given to one run
    answers: int = 1  # frames that one run gives
    takes_bytes: bool = False  # (N, T, H, W, 3) uint8, as ours; others take (N, T, 3, H, W) float, 0..1

    def inputs(self, frames: Frames) -> Tensor:
        """(T, H, W, 3) uint8 frames as the network takes them."""
        clip = torch.from_numpy(frames[: self.frames])[None]
        return clip if self.takes_bytes else clip.permute(0, 1, 4, 2, 3).float() / 255

    def layers(self, size: Size) -> list[Layer]:
        """Convolutions and matrix products of one run at an lr size, (height, width)."""
        shape = (1, self.frames, *((*size, 3) if self.takes_bytes else (3, *size)))
        with torch.no_grad(), FakeTensorMode(), _Recorder() as recorder:
            self.build()(torch.zeros(shape, dtype=torch.uint8 if self.takes_bytes else torch.float32))
        return recorder.found

    def flops(self, size: Size) -> float:
        """2 x MAC of convolutions and matrix products per frame that comes out."""
        return sum(layer.flops for layer in self.layers(size)) / self.answers

    def parameters(self) -> int:
        """Number of trained values."""
        with FakeTensorMode():
            return sum(parameter.numel() for parameter in self.build().parameters())


@dataclass(frozen=True)
class Layer:
    """One convolution or matrix product."""

    flops: float  # 2 x MAC
    elements: float  # read and written once each: inputs, weights, outputs


class _Recorder(TorchDispatchMode):
    """Keeps every operator that PyTorch's own counter of operations knows."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Layer] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator, and keep what it costs."""
        out = func(*args, **(kwargs or {}))
        if count := flop_registry.get(func.overloadpacket):
            tensors = [one for one in tree_leaves((args, kwargs, out)) if isinstance(one, Tensor)]
            flops = float(count(*args, **(kwargs or {}), out_val=out))
            self.found.append(Layer(flops, float(sum(one.numel() for one in tensors))))
        return out


def time_network(
    network: Network, runtime: str, size: Size, limit_s: float, rounds: int, threads: int, device: str
) -> Row:
    """Time a network with untrained weights, whose speed is that of trained ones.

    The first run, which also chooses kernels and takes memory, does not count. No round begins after
    ``limit_s`` seconds; where one run on a CPU would take longer, the frame is halved until it does not.

    Returns:
        ``size`` (height, width) that was measured, ``rounds`` with ``fps``, and ``memory_mb``, the peak of
        the GPU's allocator or of this process with all its libraries.
    """
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)  # untrained recurrences fade into denormals, which no trained one does
    torch.manual_seed(0)
    module = network.build().eval()
    seconds: list[float] = []
    with torch.inference_mode():
        if device == "cpu":  # on a GPU no network is too slow, and every size is compiled anew
            probe = min(_seconds(network, module, runtime, PROBE, 2, device))
            while probe * prod(size) / prod(PROBE) > limit_s and prod(size) > prod(PROBE):
                size = (size[0] // 8 * 4, size[1] // 8 * 4)  # multiples of 4, as all networks need
        for one in _seconds(network, module, runtime, size, rounds + 1, device):
            seconds.append(one)
            if sum(seconds) > limit_s:
                break
    own_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak_mb = own_kb / 2**10 if device == "cpu" else torch.cuda.max_memory_allocated() / 2**20
    fps = [{"fps": round(network.answers / one, 4)} for one in seconds[len(seconds) > 1 :]]
    return {"size": list(size), "memory_mb": round(peak_mb, 1), "rounds": fps}


def _seconds(
    network: Network, module: nn.Module, runtime: str, size: Size, times: int, device: str
) -> Iterator[float]:
    """Seconds of the same run so many times; what it needs is prepared before the first."""
    inputs = network.inputs(read_frames(network.frames, size)).to(device)
    module = module.to(device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = runtime != EAGER
    if runtime == COMPILED:
        module = torch.compile(module)  # type: ignore[assignment]  # it is called the same way
        module(inputs)
    for _ in range(times):
        started_s = time.perf_counter()
        with torch.autocast(device, torch.float16) if runtime.endswith("FP16") else nullcontext():
            module(inputs)
        if inputs.is_cuda:
            torch.cuda.synchronize()
        yield time.perf_counter() - started_s


def in_process(function: Callable[..., Any], *arguments: object, timeout_s: float | None = None) -> Any:
    """What a function returns from a process of its own. PerfError: it failed or took too long."""
    command, sent = [sys.executable, "-m", "perf.network"], pickle.dumps((function, arguments))
    try:
        run = subprocess.run(command, input=sent, capture_output=True, cwd=ROOT, timeout=timeout_s)
    except subprocess.TimeoutExpired as err:
        raise PerfError(f"not done in {timeout_s:.0f} s") from err
    if run.returncode:
        last = (run.stderr.decode().strip().splitlines() or ["too little memory?"])[-1]
        raise PerfError(
            f"{last} (status {run.returncode})".removeprefix(f"{PerfError.__module__}.PerfError: ")
        )
    return pickle.loads(run.stdout)


if __name__ == "__main__":
    called, given = pickle.load(sys.stdin.buffer)
    with redirect_stdout(sys.stderr):
        answer = called(*given)
    sys.stdout.buffer.write(pickle.dumps(answer))
