"""ONNX stage in, TensorRT plan and its identity out; a plan that no longer fits its surroundings is refused.

One code path for two libraries: TensorRT, which builds on the GPU that will run the plan, and TensorRT-RTX,
which builds ahead of time without any. Precision comes from the graph (strongly typed).
"""

from __future__ import annotations

import importlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from export import spec
from export.errors import ExportError
from export.gpus import compute_capabilities
from export.repository import sha256

log = logging.getLogger(__name__)

LIBRARIES = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt_rtx_bindings"}
"""Library -> module to import."""
INSTALL = {
    "tensorrt": "use NVIDIA's container, or install TensorRT from NVIDIA's package index",
    "tensorrt_rtx": "run `pip install -e '.[rtx]'`",
}

Profile = Mapping[str, Sequence[tuple[int, ...]]]
"""Input tensor -> min, opt and max shape."""


@dataclass(frozen=True)
class Identity:
    """Everything that a plan depends on; kept beside it as ``<plan>.json``."""

    library: str
    version: str
    gpus: list[str]
    """Compute capabilities such as ``8.6``; ``portable`` for what the library targets by default."""
    onnx_sha256: str
    profiles: list[dict[str, list[list[int]]]]


def stage_profiles(
    stage: spec.ModelSpec,
    batches: Sequence[int] = spec.BATCHES,
    lr_sizes: Sequence[spec.Size] = spec.LR_SIZES,
) -> list[Profile]:
    """Shapes of a stage's inputs to build for.

    One profile over all sizes; for the flow one per size, each over all batches: TensorRT-RTX 1.7 cannot tell
    that the flow's pyramid, padded to a multiple of 16, keeps its sides whole, and refuses a range of sizes
    ("Resize shape dims should be non-negative").
    """
    ranges = [(size,) * len(batches) for size in lr_sizes] if stage == spec.FLOW_ALIGN else [tuple(lr_sizes)]
    return [
        {
            tensor.name: [tensor.shape(batch, size) for batch, size in zip(batches, sizes, strict=True)]
            for tensor in stage.inputs
        }
        for sizes in ranges
    ]


def load_library(name: str) -> ModuleType:
    """Import a library of ``LIBRARIES``."""
    if name not in LIBRARIES:
        raise ExportError(f"expected one of the libraries {', '.join(LIBRARIES)}, found {name!r}")
    try:
        return importlib.import_module(LIBRARIES[name])
    except ImportError as err:
        raise ExportError(f"expected {name} to be installed, found none ({err}): {INSTALL[name]}") from err


def build_plan(
    library: str, source: Path, plan: Path, profiles: Sequence[Profile], gpus: Sequence[str] = ()
) -> None:
    """Compile an ONNX file.

    Args:
        library: one of ``LIBRARIES``.
        source: ONNX file, from ``tensorrt_graph``.
        plan: where the plan goes, and its identity beside it; both change only once both are complete.
        profiles: shapes to build for.
        gpus: compute capabilities, for TensorRT-RTX; by default those it targets together.

    Raises:
        ExportError: the library is missing, an operator is refused (the text names the node), or the build
            fails.
    """
    targets = _targets(library, gpus)
    trt = load_library(library)
    logger = _logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(source.read_bytes()):
        refused = [parser.get_error(index) for index in range(parser.num_errors)]
        nodes = "; ".join(
            f"{error.node_operator()} {error.node_name()!r}: {error.desc().splitlines()[0]}"
            for error in refused
        )
        raise ExportError(f"{source}: {library} {trt.__version__} refuses {nodes}; express it otherwise")

    config = builder.create_builder_config()
    if gpus:
        config.num_compute_capabilities = len(gpus)
        for index, gpu in enumerate(gpus):
            config.set_compute_capability(_compute_capability(trt, gpu), index)
    for profile in profiles:
        shapes = builder.create_optimization_profile()
        for name, (least, usual, most) in profile.items():
            shapes.set_shape(name, least, usual, most)
        config.add_optimization_profile(shapes)
    log.info("building %s from %s", plan, source)
    data = builder.build_serialized_network(network, config)
    if data is None:
        raise ExportError(f"{source}: {library} {trt.__version__} builds no plan: {'; '.join(logger.errors)}")

    identity = _identity(trt, library, source, profiles, targets)
    plan.parent.mkdir(parents=True, exist_ok=True)
    parts = {
        plan: bytes(data),
        identity_path(plan): (json.dumps(asdict(identity), indent=2) + "\n").encode(),
    }
    for path, content in parts.items():
        path.with_name(f"{path.name}.part").write_bytes(content)
    for path in parts:
        os.replace(path.with_name(f"{path.name}.part"), path)


def check_plan(
    library: str, source: Path, plan: Path, profiles: Sequence[Profile], gpus: Sequence[str] = ()
) -> None:
    """Refuse a plan that was built from something else, for something else or by something else.

    Raises:
        ExportError: what differs, and how to rebuild.
    """
    rebuild = f"rebuild it with `python -m export plans --library {library}`"
    path = identity_path(plan)
    if not plan.is_file() or not path.is_file():
        raise ExportError(f"expected a plan at {plan} and its identity at {path}, found none; {rebuild}")
    try:
        found = Identity(**json.loads(path.read_text()))
    except (ValueError, TypeError) as err:
        raise ExportError(f"expected the identity of a plan in {path}, found {err}; {rebuild}") from err
    wanted = _identity(load_library(library), library, source, profiles, _targets(library, gpus))
    for name, value in asdict(wanted).items():
        if getattr(found, name) != value:
            raise ExportError(f"{plan}: expected {name} {value}, found {getattr(found, name)}; {rebuild}")


def identity_path(plan: Path) -> Path:
    """Where the identity of a plan lies."""
    return plan.with_name(f"{plan.name}.json")


def _identity(
    trt: ModuleType, library: str, source: Path, profiles: Sequence[Profile], gpus: Sequence[str]
) -> Identity:
    return Identity(
        library=library,
        version=trt.__version__,
        gpus=list(gpus),
        onnx_sha256=sha256(source),
        profiles=[
            {name: [list(shape) for shape in shapes] for name, shapes in profile.items()}
            for profile in profiles
        ],
    )


def _targets(library: str, gpus: Sequence[str]) -> list[str]:
    """What the plan will run on, as its identity says it."""
    if library != "tensorrt":
        return list(gpus) or ["portable"]
    here = compute_capabilities()[:1]
    if not here:
        raise ExportError(
            "expected an NVIDIA GPU, which TensorRT needs to build a plan for it, found none; "
            "--library tensorrt_rtx builds plans without one"
        )
    if gpus:
        raise ExportError(
            f"expected no --gpu, for TensorRT builds for the GPU at hand ({here[0]}), found {', '.join(gpus)}"
        )
    return here


def _compute_capability(trt: ModuleType, gpu: str) -> Any:
    known = {
        f"{name[2:-1]}.{name[-1]}": getattr(trt.ComputeCapability, name)
        for name in dir(trt.ComputeCapability)
        if name.startswith("SM")
    }
    if gpu not in known:
        raise ExportError(f"expected a compute capability of {', '.join(known)}, found {gpu!r}")
    return known[gpu]


def _logger(trt: ModuleType) -> Any:
    """A logger that keeps errors for our own message; a class of the library, so made when it is there."""

    class Logger(trt.ILogger):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)  # pybind11 wants its own base named
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)

    return Logger()
