"""The roofline: what a network asks of a device, and the least time that the device's ceilings allow."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from export.network import MstGan, Widths
from perf.clip import Size
from perf.errors import one_line

PRECISIONS = {"FP32": 4, "TF32": 4, "FP16": 2, "INT8": 1}
"""Ceiling of arithmetic -> bytes of an element that goes with it."""
COPY = "copy"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Layer:
    """One convolution or matrix product."""

    flops: float
    """2 x MAC."""
    elements: float
    """Read and written once each: inputs, weights, outputs."""


def layers(build: Callable[[], nn.Module], inputs: Callable[[], Tensor]) -> list[Layer]:
    """All layers of one run, counted without computing anything."""
    with torch.no_grad(), FakeTensorMode(), _Recorder() as recorder:
        build()(inputs())
    return recorder.found


@cache
def our_layers(widths: Widths, size: Size, batch: int) -> list[Layer]:
    """Those of MST-GAN for a batch of windows; lr size as (height, width)."""
    return layers(
        lambda: MstGan(widths), lambda: torch.zeros((batch, 3, *size, 3), dtype=torch.uint8)
    )  # fmt: skip


def least_seconds(found: Sequence[Layer], precision: str, ceilings: dict[str, float]) -> float:
    """The least time for these layers, one after the other; what lies between them counts as free.

    Args:
        found: The layers.
        precision: One of ``PRECISIONS``, for all layers.
        ceilings: FLOP/s by precision, and bytes/s of ``COPY``.
    """
    arithmetic, memory = ceilings[precision], ceilings[COPY]
    return sum(
        max(layer.flops / arithmetic, layer.elements * PRECISIONS[precision] / memory) for layer in found
    )


def measure_ceilings(
    device: str, side: int = 8192, copy_bytes: int = 2**30, repeats: int = 10
) -> dict[str, float]:
    """The best that a large square product and a large copy reach on a device.

    Returns:
        FLOP/s (2 x MAC) for every precision that the device has, and bytes/s, read and written, of ``COPY``.
    """
    found = {}
    for precision in PRECISIONS if device != "cpu" else ("FP32",):
        try:
            product = _product(precision, device, side)
            found[precision] = 2 * side**3 / _best_seconds(product, device, repeats)
        except RuntimeError as err:
            # Rows of this precision have no roofline then; all others have theirs.
            log.warning("no ceiling for %s: %s", precision, one_line(err))
    source = torch.zeros(copy_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found[COPY] = 2 * copy_bytes / _best_seconds(lambda: target.copy_(source), device, repeats)
    return found


def _product(precision: str, device: str, side: int) -> Callable[[], Tensor]:
    torch.backends.cuda.matmul.allow_tf32 = precision == "TF32"
    if precision == "INT8":
        one = torch.ones((side, side), dtype=torch.int8, device=device)
        return lambda: torch._int_mm(one, one)
    dtype = torch.float16 if precision == "FP16" else torch.float32
    factor = torch.randn((side, side), dtype=dtype, device=device)
    return lambda: factor @ factor


def _best_seconds(run: Callable[[], object], device: str, repeats: int) -> float:
    """Of the runs after the first, which chooses kernels."""
    seconds = []
    for _ in range(repeats + 1):
        started_s = time.perf_counter()
        run()
        if device != "cpu":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started_s)
    return min(seconds[1:])


class _Recorder(TorchDispatchMode):
    """Notes every operator that PyTorch's own counter of operations knows."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Layer] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator, and note what it cost."""
        out = func(*args, **(kwargs or {}))
        if count := flop_registry.get(func.overloadpacket):
            tensors = [one for one in tree_leaves((args, kwargs, out)) if isinstance(one, Tensor)]
            flops = float(count(*args, **(kwargs or {}), out_val=out))
            self.found.append(Layer(flops, float(sum(one.numel() for one in tensors))))
        return out
