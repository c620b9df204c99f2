"""Parity: exported stages against the PyTorch reference, on real frames."""

from __future__ import annotations

import json
import logging
import math
import tomllib
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
from polygraphy.logger import G_LOGGER

from export import spec
from export.data.sample import sample_windows
from export.errors import ExportError
from export.network import MstGan

log = logging.getLogger(__name__)

TOLERANCES = Path(__file__).with_name("tolerances.toml")
REPORT = "parity.json"
CASES: tuple[tuple[int, spec.Size], ...] = ((4, (68, 160)), (1, (180, 320)))
"""Batch and lr size: a full batch whose deeper levels are all odd, and one frame of a usual shape."""

Array = NDArray[np.uint8] | NDArray[np.float16] | NDArray[np.float32]
Tensors = dict[str, Array]


@dataclass(frozen=True)
class Comparison:
    """One output tensor of one stage, in one case."""

    stage: str
    rung: str
    tensor: str
    shape: tuple[int, ...]
    psnr_db: float
    max_error: float
    min_psnr_db: float
    tolerated_error: float

    @property
    def passed(self) -> bool:
        """Whether both tolerances hold."""
        return self.psnr_db >= self.min_psnr_db and self.max_error <= self.tolerated_error

    def __str__(self) -> str:
        """One line for a log or an error."""
        return (
            f"{self.stage}.{self.tensor} in {self.rung}, {'x'.join(map(str, self.shape))}: "
            f"{self.psnr_db:.1f} dB (at least {self.min_psnr_db:g}), "
            f"max error {self.max_error:.3g} (at most {self.tolerated_error:g})"
        )


def psnr_db(found: Array, reference: Array) -> float:
    """PSNR against the reference's own range; 200 dB stands for equality."""
    error = float(np.mean((found.astype(np.float64) - reference) ** 2))
    peak = float(np.ptp(reference.astype(np.float64))) or 1.0
    return min(200.0, 10 * math.log10(peak**2 / error)) if error else 200.0


class Comparer:
    """Compares tensors under one section of the committed tolerances."""

    def __init__(self, section: str) -> None:
        self.tolerances = tomllib.loads(TOLERANCES.read_text())[section]

    def __call__(
        self, model: spec.ModelSpec, rung: str, found: Tensors, reference: Tensors
    ) -> list[Comparison]:
        """Compare all outputs of a model, of that rung."""
        rows = []
        for tensor in (output.name for output in model.outputs):
            a, b = found[tensor], reference[tensor]
            if a.shape != b.shape or a.dtype != b.dtype:
                raise ExportError(
                    f"{model.name}.{tensor}: expected {b.dtype} {b.shape}, found {a.dtype} {a.shape}; "
                    "the exported graph does not follow export/spec.py"
                )
            tolerance = self.tolerances[model.name][tensor]
            worst = float(np.abs(a.astype(np.float64) - b).max())
            rows.append(
                Comparison(
                    model.name, rung, tensor, a.shape, psnr_db(a, b), worst,
                    tolerance["psnr_db"], tolerance["max_error"],
                )
            )  # fmt: skip
        return rows


def compare_onnx(network: MstGan, chains: Mapping[str, Mapping[str, Path]]) -> list[Comparison]:
    """Run every stage on the reference's inputs, and the chains on their own, in ONNX Runtime on the CPU.

    Args:
        network: the reference.
        chains: rung -> ONNX file of every stage; files that chains share are compared once.
    """
    G_LOGGER.module_severity = G_LOGGER.ERROR
    compare = Comparer("onnx")
    rows = []
    with ExitStack() as stack:
        runners = {
            path: stack.enter_context(
                OnnxrtRunner(SessionFromOnnx(str(path), providers=["CPUExecutionProvider"]))
            )
            for path in {path for chain in chains.values() for path in chain.values()}
        }
        for batch, lr_size in CASES:
            reference: Tensors = {spec.LR_WINDOW.name: sample_windows(batch, lr_size)}
            for stage in spec.STAGES:
                reference |= _run_reference(network, stage, reference)
            compared: set[Path] = set()
            for rung, chain in chains.items():
                chained: Tensors = {spec.LR_WINDOW.name: reference[spec.LR_WINDOW.name]}
                for stage in spec.STAGES:
                    path = chain[stage.name]
                    if path not in compared:
                        rows += compare(stage, rung, _run(runners[path], stage, reference), reference)
                        compared.add(path)
                    chained |= _run(runners[path], stage, chained)
                rows += compare(spec.ENSEMBLE, rung, chained, reference)
    return rows


def _run_reference(network: MstGan, stage: spec.ModelSpec, tensors: Tensors) -> Tensors:
    with torch.inference_mode():
        inputs = [torch.from_numpy(tensors[tensor.name]) for tensor in stage.inputs]
        outputs = network.get_submodule(stage.name)(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return {tensor.name: value.numpy() for tensor, value in zip(stage.outputs, outputs, strict=True)}


def _run(runner: OnnxrtRunner, stage: spec.ModelSpec, tensors: Tensors) -> Tensors:
    outputs = runner.infer({tensor.name: tensors[tensor.name] for tensor in stage.inputs})
    # A runner may hand out the same buffers again at its next call.
    return {name: np.array(value) for name, value in outputs.items()}


def check(rows: list[Comparison], folder: Path) -> None:
    """Log the comparisons, start ``parity.json`` in ``folder`` with them, and refuse a failed one.

    Raises:
        ExportError: a tolerance does not hold.
    """
    report = {"onnx": [{**asdict(row), "passed": row.passed} for row in rows]}
    (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n")
    for row in rows:
        log.info("%s %s", "ok  " if row.passed else "FAIL", row)
    failed = [str(row) for row in rows if not row.passed]
    if failed:
        raise ExportError(
            f"parity with PyTorch does not hold: {'; '.join(failed)}. Nothing was installed; "
            f"see {folder / REPORT}, tolerances in {TOLERANCES}"
        )
