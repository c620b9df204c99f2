"""Triton model repository: writes its configurations, and installs ONNX files and plans."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import onnx
from google.protobuf import text_format
from google.protobuf.message import DecodeError
from tritonclient.grpc import model_config_pb2 as pb

from export import spec
from export.errors import ExportError
from export.model_config import (
    COMPUTE_CAPABILITIES,
    FP32,
    MODEL_FILE,
    SERVING_CONFIGS,
    TENSORRT,
    WITH_PRECISIONS,
    config_text,
    ensemble_config,
    plan_file,
    precision_file,
    stage_configs,
    stream_configs,
)

VERSION = "1"  # the one version directory of every model
PARENT_KEY = "fp32_sha256"  # in the metadata of a converted graph: digest of the FP32 graph it came from
CONTRACT_FILE = f"{spec.ENSEMBLE.name}/contract.pbtxt"
"""The committed form of the ensemble's configuration: all but which weights are served. ``config.pbtxt``, and
``configs/*.pbtxt`` for every other target, are written on export beside the models, and like these are not
committed."""

ONNX_TYPES = {
    "UINT8": onnx.TensorProto.UINT8,
    "FP16": onnx.TensorProto.FLOAT16,
    "FP32": onnx.TensorProto.FLOAT,
}


@dataclass(frozen=True)
class Weights:
    """Which checkpoint a repository serves, see ``spec.IDENTITY``."""

    name: str
    digest: str

    def identity(self, precision: str) -> dict[str, str]:
        """What the ensemble publishes where its generator has this precision."""
        return {
            spec.WEIGHTS_DIGEST: self.digest,
            spec.WEIGHTS_NAME: self.name,
            spec.PRECISION: precision,
            spec.RELEASE: metadata.version("mst-gan-triton"),
        }


def weights_of(checkpoint: Path) -> Weights:
    """Name and digest of a checkpoint file."""
    return Weights(checkpoint.stem, sha256(checkpoint))


def committed_configs() -> dict[str, pb.ModelConfig]:
    """Path below the repository -> configuration, of every file that is committed."""
    return {**stage_configs(), CONTRACT_FILE: ensemble_config({})}


def write_configs(repository: Path) -> None:
    """Write every configuration and the version directory that Triton wants even of an ensemble.

    An ensemble that was exported still publishes the weights that it published before.
    """
    ensemble = repository / spec.ENSEMBLE.name
    files = {repository / name: config for name, config in committed_configs().items()}
    for path in (ensemble / "config.pbtxt", *(ensemble / "configs").glob("*.pbtxt")):
        files[path] = ensemble_config(_published_identity(path))
    streaming = repository / spec.STREAM_ENSEMBLE.name / "config.pbtxt"
    if streaming.is_file():
        configs = stream_configs(_published_identity(streaming))
        files |= {repository / name: config for name, config in configs.items()}
    for path, config in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(config_text(config))
    ensemble_version = ensemble / VERSION
    ensemble_version.mkdir(exist_ok=True)
    (ensemble_version / ".gitkeep").touch()


def stage_path(build: Path, stage: spec.ModelSpec, precision: str = FP32) -> Path:
    """Where a stage's ONNX file lies in a build folder; FP32 goes unnamed, for every stage has it."""
    return build / (f"{stage.name}.onnx" if precision == FP32 else f"{stage.name}.{precision}.onnx")


def generator_path(build: Path, precision: str) -> Path:
    """Where a generator of one precision lies in a build folder."""
    return stage_path(build, spec.GENERATOR, precision)


def sha256(path: Path) -> str:
    """Digest of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def parent_digest(path: Path) -> str:
    """Digest of the FP32 graph that a graph says it was converted from; empty where it does not say."""
    return next((p.value for p in onnx.load(path).metadata_props if p.key == PARENT_KEY), "")


def install(
    build: Path, repository: Path, weights: Weights, precisions: Mapping[str, Sequence[str]] | None = None
) -> None:
    """Put every stage of a build folder into the repository: all of them, or none.

    ``model.onnx`` of each model is what ``config.pbtxt`` serves; beside it lie its other precisions, by name.
    Those of an earlier export stay if they come from the same FP32 graph, and go if they do not. Everything
    is checked and written next to its target first; what remains is one rename per file.

    Args:
        build: folder with ``<model>.onnx``, and ``<model>.<precision>.onnx``.
        repository: where the models lie.
        weights: what the stages were exported from; the ensemble's configurations publish it.
        precisions: stage -> precisions to install beside FP32; the last becomes ``model.onnx``, in place of
            FP32.

    Raises:
        ExportError: A file is missing, unreadable, off the contract, or cannot be copied.
    """
    files = []
    served = FP32
    for stage in spec.STAGES:
        all_precisions = (FP32, *(precisions or {}).get(stage.name, ()))
        if stage == spec.GENERATOR:
            served = all_precisions[-1]
        files.append((stage, stage_path(build, stage, all_precisions[-1]), MODEL_FILE))
        if stage.name in WITH_PRECISIONS:
            files += [(stage, stage_path(build, stage, one), precision_file(one)) for one in all_precisions]
    for stage, source, _ in files:
        check_onnx(source, stage)

    ensemble = repository / spec.ENSEMBLE.name
    targets: dict[Path, Path | str] = {
        repository / stage.name / VERSION / name: source for stage, source, name in files
    }
    targets[ensemble / "config.pbtxt"] = config_text(ensemble_config(weights.identity(served)))
    for name, choice in SERVING_CONFIGS.items():
        precision = choice.precisions[spec.GENERATOR.name]
        config = ensemble_config(weights.identity(precision))
        targets[ensemble / "configs" / f"{name}.pbtxt"] = config_text(config)
    try:
        _write_all(targets)
        _remove_stale(build, repository)
        _publish_plans(repository, weights)
    except OSError as err:
        raise ExportError(f"cannot install the ONNX files into {repository}: {err}") from err


def install_stream(build: Path, repository: Path, weights: Weights, precision: str = FP32) -> None:
    """Put the streaming ensemble beside the window ensemble: all of it, or nothing.

    Args:
        build: folder with ``<stage>.onnx`` of ``spec.STREAM_STAGES`` and of the pixel shuffle, and
            ``<stage>.<precision>.onnx`` of the former.
        repository: where the models lie; its pixel shuffle is the same.
        weights: what the stages were exported from.
        precision: to serve.

    Raises:
        ExportError: A file is missing, unreadable, off the contract, or cannot be copied.
    """
    sources: dict[spec.ModelSpec, Path] = {
        stage: stage_path(build, stage, precision) for stage in spec.STREAM_STAGES
    }
    sources[spec.PIXEL_SHUFFLE] = stage_path(build, spec.PIXEL_SHUFFLE)
    for stage, source in sources.items():
        check_onnx(source, stage)
    targets: dict[Path, Path | str] = {
        repository / stage.name / VERSION / MODEL_FILE: source for stage, source in sources.items()
    }
    configs = {**stage_configs(), **stream_configs(weights.identity(precision))}
    wanted = {spec.STREAM_ENSEMBLE.name, *(stage.name for stage in sources)}
    targets |= {
        repository / name: config_text(config)
        for name, config in configs.items()
        if Path(name).parts[0] in wanted
    }
    try:
        (repository / spec.STREAM_ENSEMBLE.name / VERSION).mkdir(parents=True, exist_ok=True)
        _write_all(targets)
    except OSError as err:
        raise ExportError(f"cannot install the ONNX files into {repository}: {err}") from err


def install_plans(
    plans: Mapping[str, Path],
    identities: Mapping[str, Path],
    repository: Path,
    compute_capability: str,
    weights: Weights,
) -> None:
    """Put the plans of one kind of GPU into the repository, each with its identity: all of them, or none.

    Plans of other GPUs stay: Triton picks by ``cc_model_filenames``.

    Args:
        plans: model name -> plan, checked against its surroundings by the caller.
        identities: model name -> what the plan depends on (``plan.Identity``), as a file.
        repository: where the models lie.
        compute_capability: of the GPU that the plans were built on, as ``8.9``.
        weights: what the plans were made from; the ensemble's ``tensorrt`` configuration publishes it.

    Raises:
        ExportError: the configurations know no such GPU, or a file cannot be copied.
    """
    if compute_capability not in COMPUTE_CAPABILITIES:
        raise ExportError(
            f"expected a GPU of compute capability {', '.join(COMPUTE_CAPABILITIES)}, found "
            f"{compute_capability}; add it to COMPUTE_CAPABILITIES in export/model_config.py"
        )
    name = plan_file(compute_capability)
    targets: dict[Path, Path | str] = {}
    for model, path in plans.items():
        targets[repository / model / VERSION / name] = path
        targets[repository / model / VERSION / f"{name}.json"] = identities[model]
    try:
        _write_all(targets)
        _publish_plans(repository, weights)
    except OSError as err:
        raise ExportError(f"cannot install the plans into {repository}: {err}") from err


def _published_identity(path: Path) -> dict[str, str]:
    """Values of ``spec.IDENTITY`` in an ensemble's configuration; none if it is missing or has none."""
    if not path.is_file():
        return {}
    try:
        parameters = text_format.Parse(path.read_text(), pb.ModelConfig()).parameters
    except text_format.ParseError:
        return {}
    return {name: parameters[name].string_value for name in spec.IDENTITY if name in parameters}


def _publish_plans(repository: Path, weights: Weights) -> None:
    """Write the ensemble's configuration for the plans that lie there, or remove it where none do.

    A GPU may serve another precision than the next: then all are named.
    """
    path = repository / spec.ENSEMBLE.name / "configs" / f"{TENSORRT}.pbtxt"
    identities = (repository / spec.GENERATOR.name / VERSION).glob(f"{plan_file('*')}.json")
    graphs = [json.loads(identity.read_text())["graph"] for identity in identities]
    if graphs:
        precisions = sorted({graph.removeprefix(f"{spec.GENERATOR.name}.") for graph in graphs})
        config = ensemble_config(weights.identity(", ".join(precisions)))
        _write_all({path: config_text(config)})
    else:
        path.unlink(missing_ok=True)


def _write_all(targets: Mapping[Path, Path | str]) -> None:
    """Put every file, a copy of another or a text, next to its target, and only then rename them all."""
    staged: list[tuple[Path, Path]] = []
    try:
        for target, content in targets.items():
            part = target.with_name(f"{target.name}.part")
            target.parent.mkdir(parents=True, exist_ok=True)
            staged.append((part, target))
            if isinstance(content, Path):
                shutil.copyfile(content, part)
            else:
                part.write_text(content)
        for part, target in staged:
            os.replace(part, target)
    finally:
        for part, _ in staged:
            part.unlink(missing_ok=True)


def _remove_stale(build: Path, repository: Path) -> None:
    """Delete graphs and plans of other weights than those just installed: nobody should serve both."""
    for stage in spec.STAGES:
        digest = sha256(stage_path(build, stage))
        version = repository / stage.name / VERSION
        for path in version.glob(precision_file("*")):
            if path.name != precision_file(FP32) and parent_digest(path) != digest:
                path.unlink()
        for path in version.glob(plan_file("*")):
            identity = path.with_name(f"{path.name}.json")
            if not identity.is_file() or digest not in identity.read_text():
                path.unlink()
                identity.unlink(missing_ok=True)


def check_onnx(source: Path, stage: spec.ModelSpec) -> None:
    """Refuse a file that the server would refuse: the native backend compares the same names and types."""
    try:
        model = onnx.load(source, load_external_data=False)
    except FileNotFoundError as err:
        raise ExportError(f"{source} does not exist: run `make export`") from err
    except (OSError, DecodeError) as err:
        raise ExportError(f"{source} is not a readable ONNX file ({err}): run `make export` again") from err

    for kind, wanted, values in (
        ("inputs", stage.graph_inputs, model.graph.input),
        ("outputs", stage.graph_outputs, model.graph.output),
    ):
        expected = {tensor.name: ONNX_TYPES[tensor.dtype] for tensor in wanted}
        found = {value.name: value.type.tensor_type.elem_type for value in values}
        if expected != found:
            raise ExportError(
                f"{source}: expected {kind} {_described(expected)}, found {_described(found) or 'none'}; "
                "make the exported graph follow export/spec.py"
            )
    if any(weights.data_location == onnx.TensorProto.EXTERNAL for weights in model.graph.initializer):
        raise ExportError(
            f"{source}: expected one self-contained file, found weights stored outside it; "
            "export without external data"
        )


def _described(tensors: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {onnx.TensorProto.DataType.Name(dtype)}" for name, dtype in tensors.items())
