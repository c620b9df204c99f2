"""ONNX stage in, TensorRT plan and its identity out; a plan that no longer fits its surroundings is refused.

One code path, through Polygraphy, for two libraries: TensorRT, which builds on the GPU that will run the
plan, and TensorRT-RTX, which builds ahead of time without any. Precision comes from the graph.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

from export import spec
from export.errors import ExportError
from export.repository import parent_digest, sha256
from export.tensorrt.gpus import compute_capabilities

log = logging.getLogger(__name__)

LIBRARIES = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt_rtx_bindings"}
"""Library -> module to import."""
INSTALL = {
    "tensorrt": "use NVIDIA's container, or install TensorRT from NVIDIA's package index",
    "tensorrt_rtx": "run `pip install -e '.[rtx]'`",
}

NODE = re.compile(r"In node -?\d+ with name: (.*) and operator: (\S+) \(.*?\): (.+)")
"""How both libraries' parsers name a node that they refuse."""

Profile = Mapping[str, Sequence[tuple[int, ...]]]
"""Input tensor -> min, opt and max shape."""


@dataclass(frozen=True)
class Identity:
    """Everything that a plan depends on; kept beside it as ``<plan>.json``."""

    library: str
    version: str
    graph: str
    """Name of the ONNX file without suffix, such as ``generator.int8``."""
    gpus: list[str]
    """Compute capabilities such as ``8.6``; ``portable`` for what the library targets by default."""
    onnx_sha256: str
    fp32_sha256: str
    """Of the FP32 graph that the ONNX file was converted from; empty where that does not say."""
    profile: dict[str, list[list[int]]]


def stage_profile(
    stage: spec.ModelSpec,
    batches: Sequence[int] = spec.BATCHES,
    lr_sizes: Sequence[spec.Size] = spec.LR_SIZES,
) -> Profile:
    """Min, opt and max shape of a stage's inputs: one profile, so that any size between is served by it."""
    return {
        tensor.name: [tensor.shape(batch, size) for batch, size in zip(batches, lr_sizes, strict=True)]
        for tensor in stage.inputs
    }


def load_library(name: str) -> ModuleType:
    """Import a library of ``LIBRARIES``."""
    if name not in LIBRARIES:
        raise ExportError(f"expected one of the libraries {', '.join(LIBRARIES)}, found {name!r}")
    try:
        return importlib.import_module(LIBRARIES[name])
    except ImportError as err:
        raise ExportError(f"expected {name} to be installed, found none ({err}): {INSTALL[name]}") from err


def build_plan(
    library: str, source: Path, plan: Path, profile: Profile, gpus: Sequence[str] = (),
    timing_cache: Path | None = None,
) -> None:  # fmt: skip
    """Compile an ONNX file.

    Args:
        library: one of ``LIBRARIES``; a process compiles with one of them.
        source: ONNX file, from ``tensorrt_graph``.
        plan: where the plan goes, and its identity beside it; both change only once both are complete.
        profile: shapes to build for.
        gpus: compute capabilities, for TensorRT-RTX; by default those it targets together.
        timing_cache: file of kernel timings to read and to add to, so that TensorRT's next build is quicker;
            TensorRT-RTX times nothing while building, and has none.

    Raises:
        ExportError: the library is missing, an operator is refused (the text names the node), or the build
            fails.
    """
    targets = _targets(library, gpus)
    trt = load_library(library)
    capabilities = [_compute_capability(trt, gpu) for gpu in gpus]
    point_polygraphy_at(library, trt)
    from polygraphy.backend import trt as backend
    from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

    shapes = backend.Profile()
    for name, (least, usual, most) in profile.items():
        shapes.add(name, least, usual, most)
    cache = str(timing_cache) if timing_cache is not None and library == "tensorrt" else None
    known = cache if cache is not None and Path(cache).is_file() else None
    if library == "tensorrt":
        config = backend.CreateConfig(profiles=[shapes], load_timing_cache=known)
    else:
        config = CreateConfigRTX(profiles=[shapes], compute_capabilities=capabilities or None)
    plan.parent.mkdir(parents=True, exist_ok=True)
    log.info("building %s from %s", plan, source)
    with _said(f"{source}: {library} {trt.__version__} refuses {{}}; express it otherwise"):
        network = backend.network_from_onnx_path(str(source), strongly_typed=True)
    with _said(f"{source}: {library} {trt.__version__} builds no plan: {{}}"):
        data = bytes(backend.engine_bytes_from_network(network, config, save_timing_cache=cache))

    identity = _identity(trt, library, source, profile, targets)
    parts = {
        plan: data,
        identity_path(plan): (json.dumps(asdict(identity), indent=2) + "\n").encode(),
    }
    for path, content in parts.items():
        path.with_name(f"{path.name}.part").write_bytes(content)
    for path in parts:
        os.replace(path.with_name(f"{path.name}.part"), path)


def point_polygraphy_at(library: str, module: ModuleType) -> None:
    """Make Polygraphy use a library; it decides once, when its own modules are imported.

    Raises:
        ExportError: it has decided for the other one in this process.
    """
    from polygraphy import config

    rtx = library == "tensorrt_rtx"
    if "polygraphy.backend.trt.loader" in sys.modules and rtx != config.USE_TENSORRT_RTX:
        raise ExportError(f"expected one library per process, found {library} after another; start anew")
    config.USE_TENSORRT_RTX = rtx
    sys.modules.setdefault(
        library, module
    )  # PyPI has RTX's bindings under a name that Polygraphy does not know


def check_plan(library: str, source: Path, plan: Path, profile: Profile, gpus: Sequence[str] = ()) -> None:
    """Refuse a plan that was built from something else, for something else or by something else.

    Raises:
        ExportError: what differs, and how to rebuild.
    """
    rebuild = f"rebuild it with `python -m export plans --library {library}`"
    if library == "tensorrt":
        rebuild = "rebuild it with `make export TARGET=tensorrt`"
    path = identity_path(plan)
    if not plan.is_file() or not path.is_file():
        raise ExportError(f"expected a plan at {plan} and its identity at {path}, found none; {rebuild}")
    try:
        found = Identity(**json.loads(path.read_text()))
    except (ValueError, TypeError) as err:
        raise ExportError(f"expected the identity of a plan in {path}, found {err}; {rebuild}") from err
    wanted = _identity(load_library(library), library, source, profile, _targets(library, gpus))
    for name, value in asdict(wanted).items():
        if getattr(found, name) != value:
            raise ExportError(f"{plan}: expected {name} {value}, found {getattr(found, name)}; {rebuild}")


def identity_path(plan: Path) -> Path:
    """Where the identity of a plan lies."""
    return plan.with_name(f"{plan.name}.json")


def _identity(trt: ModuleType, library: str, source: Path, profile: Profile, gpus: Sequence[str]) -> Identity:
    return Identity(
        library=library,
        version=trt.__version__,
        graph=source.stem,
        gpus=list(gpus),
        onnx_sha256=sha256(source),
        fp32_sha256=parent_digest(source),
        profile={name: [list(shape) for shape in shapes] for name, shapes in profile.items()},
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


def _compute_capability(trt: ModuleType, gpu: str) -> tuple[int, int]:
    known = [f"{n[2:-1]}.{n[-1]}" for n in dir(trt.ComputeCapability) if n.startswith("SM")]
    if gpu not in known:
        raise ExportError(f"expected a compute capability of {', '.join(known)}, found {gpu!r}")
    major, minor = gpu.split(".")
    return int(major), int(minor)


@contextmanager
def _said(error: str) -> Iterator[None]:
    """Turn Polygraphy's failure into ours, whose ``{}`` is what the library had logged by then."""
    from polygraphy.exception import PolygraphyException
    from polygraphy.logger import G_LOGGER

    messages: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(" ".join(record.getMessage().removeprefix("[E] ").split()))

    handler, logger = Keep(logging.ERROR), logging.getLogger("Polygraphy")
    G_LOGGER.use_python_logging_system = True
    logger.propagate = False
    logger.addHandler(handler)
    try:
        yield
    except PolygraphyException as err:
        # Of a refusal the parser says in several lines where it was, and in one which node and why.
        nodes = [NODE.sub(r"\2 '\1': \3", text) for text in messages if NODE.match(text)]
        raise ExportError(error.replace("{}", "; ".join(nodes or messages[:-1]) or str(err))) from err
    finally:
        logger.removeHandler(handler)
