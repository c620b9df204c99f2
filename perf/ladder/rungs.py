"""The rungs as data: which weights, in which precision, served how."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from perf.errors import PerfError

NO_FP16 = "no GPU, and ONNX Runtime computes no convolution in FP16 on an x86 processor"


class CannotRunError(Exception):
    """This machine or this checkout cannot run a rung; the text says why."""


@dataclass(frozen=True)
class Rung:
    """One row of the table."""

    key: str
    """For the command line, and for folders."""
    name: str
    widths: str
    """Of the network; names its checkpoint too."""
    target: str | None
    """Of ``export build``, and of the configurations served; None: PyTorch alone, without a server."""
    instances: int = 1
    """Of every stage."""
    batch: int = 1
    """Windows that the server's batcher may put together; 1: every window runs alone."""
    needs_gpu: bool = False

    @property
    def in_flight(self) -> int:
        """Requests kept at the server: one batch at work and one waiting, for each instance."""
        return 2 * self.instances * self.batch

    def check_machine(self) -> None:
        """Refuse what this machine has no hardware for.

        Raises:
            CannotRunError: It has none.
        """
        if self.needs_gpu and not torch.cuda.is_available():
            raise CannotRunError(NO_FP16 if self.target == "cuda" else "no GPU")


FIRST = Rung("baseline-eager", "baseline, PyTorch eager, FP32", "baseline", None)
RUNGS = (
    FIRST,
    Rung("baseline-fp32", "baseline, served, FP32", "baseline", "fp32"),
    Rung("pruned-fp32", "pruned, FP32", "pruned", "fp32"),
    Rung("pruned-fp16", "pruned, FP16", "pruned", "cuda", needs_gpu=True),
    Rung("pruned-int8", "pruned, INT8", "pruned", "cpu"),
    Rung("pruned-int8-batched", "pruned, INT8, two instances, batch 4", "pruned", "cpu", 2, 4),
    Rung("compact-int8", "compact, INT8, two instances, batch 4", "compact", "cpu", 2, 4),
    Rung("student-int8", "student, INT8, two instances, batch 4", "student", "cpu", 2, 4),
)
GPU_RUNGS = (
    Rung("pruned-fp16-batched", "pruned, FP16, two instances, batch 4", "pruned", "cuda", 2, 4, True),
    Rung("pruned-plan", "pruned, TensorRT plan", "pruned", "tensorrt", needs_gpu=True),
    Rung("pruned-plan-batched", "pruned, TensorRT, two instances, batch 4", "pruned", "tensorrt", 2, 4, True),
)
"""Where there is a GPU."""


def chosen(keys: str | None) -> list[Rung]:
    """The rungs of a comma-separated list, or all for this machine; the first is always among them.

    Raises:
        PerfError: There is no such rung.
    """
    if keys is None:
        return [*RUNGS, *(GPU_RUNGS if torch.cuda.is_available() else ())]
    known = {rung.key: rung for rung in (*RUNGS, *GPU_RUNGS)}
    wanted = [key.strip() for key in keys.split(",") if key.strip()]
    if unknown := [key for key in wanted if key not in known]:
        raise PerfError(f"expected rows among {', '.join(known)}; found {unknown[0]!r}")
    # All others are measured against it.
    return [rung for key, rung in known.items() if rung == FIRST or key in wanted]
