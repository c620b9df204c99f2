"""Triton model repository: the contract in, ``config.pbtxt`` files and installed ONNX files out."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
from google.protobuf import text_format
from google.protobuf.message import DecodeError
from tritonclient.grpc import model_config_pb2 as pb

from export import spec
from export.errors import ExportError

VERSION = "1"  # the one version directory of every model
MODEL_FILE = "model.onnx"  # what config.pbtxt serves: the best that the last export made for its machine
FP32, FP16, INT8 = "fp32", "fp16", "int8"  # rungs: precisions that a generator comes in
PARENT_KEY = "fp32_sha256"  # in a rung's metadata: digest of the FP32 graph that it was converted from
BANNER = "# Generated from export/spec.py by `python -m export repository`; edit there.\n"

# How long the batcher holds an incomplete batch. The slowest stage runs for tens of milliseconds even on a
# GPU, so a few of waiting cost little latency, and decoder jitter between a client's windows is about that.
MAX_QUEUE_DELAY_US = 3000

# Batches that every instance runs before the server reports ready, so that no client pays for kernels and
# memory pools. The frame is the smallest one served: a CPU server warms up six instances before it starts.
WARMUP_BATCHES = tuple(sorted({spec.BATCHES[0], spec.MAX_BATCH}))
WARMUP_SIZE = spec.LR_SIZES[0]


@dataclass(frozen=True)
class Choice:
    """What ``tritonserver --model-config-name`` can choose in place of ``config.pbtxt``."""

    kind: pb.ModelInstanceGroup.Kind.ValueType
    """Device of the instances; ``KIND_AUTO`` is a GPU where Triton sees one, else the CPU."""
    rung: str
    """Precision of the generator."""


CHOICES = {
    "cpu": Choice(pb.ModelInstanceGroup.KIND_CPU, INT8),
    "cuda": Choice(pb.ModelInstanceGroup.KIND_GPU, FP16),
    "fp32": Choice(pb.ModelInstanceGroup.KIND_AUTO, FP32),
}

ONNX_TYPES = {
    "UINT8": onnx.TensorProto.UINT8,
    "FP16": onnx.TensorProto.FLOAT16,
    "FP32": onnx.TensorProto.FLOAT,
}


def config_files() -> dict[str, pb.ModelConfig]:
    """Path below the repository -> configuration."""
    files = {}
    for stage in spec.STAGES:
        default = files[f"{stage.name}/config.pbtxt"] = _stage_config(stage)
        for name, choice in CHOICES.items():
            config = _stage_config(stage, choice)
            if config != default:  # Triton falls back to config.pbtxt
                files[f"{stage.name}/configs/{name}.pbtxt"] = config
    files[f"{spec.ENSEMBLE.name}/config.pbtxt"] = _ensemble_config()
    return files


def config_text(config: pb.ModelConfig) -> str:
    """The text of a configuration file, with a first line that says where to edit it."""
    text: str = text_format.MessageToString(config, use_short_repeated_primitives=True)
    return BANNER + text


def write_configs(repository: Path) -> None:
    """Write every configuration and the version directory that Triton wants even of an ensemble."""
    for name, config in config_files().items():
        path = repository / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(config_text(config))
    ensemble_version = repository / spec.ENSEMBLE.name / VERSION
    ensemble_version.mkdir(exist_ok=True)
    (ensemble_version / ".gitkeep").touch()


def rung_file(rung: str) -> str:
    """Name of a generator of one precision in the repository, beside ``model.onnx``."""
    return f"model.{rung}.onnx"


def rung_path(build: Path, rung: str) -> Path:
    """Where a generator of one precision lies in a build folder."""
    return build / (f"{spec.GENERATOR.name}.onnx" if rung == FP32 else f"{spec.GENERATOR.name}.{rung}.onnx")


def sha256(path: Path) -> str:
    """Digest of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def install(build: Path, repository: Path, rungs: Sequence[str] = (), served: str = FP32) -> None:
    """Put every stage of a build folder into the repository: all of them, or none.

    ``model.onnx`` of each model is what ``config.pbtxt`` serves; beside the generator's lie its rungs, by
    name. Rungs of an earlier export stay if they come from the same FP32 graph, and go if they do not.
    Everything is checked and copied next to its target first; what remains is one rename per file.

    Args:
        build: folder with ``<model>.onnx``, and ``generator.<rung>.onnx``.
        repository: where the models lie.
        rungs: of the generator to install beside FP32.
        served: the rung that becomes ``model.onnx``.

    Raises:
        ExportError: A file is missing, unreadable, off the contract, or cannot be copied.
    """
    generators = {MODEL_FILE: served} | {rung_file(rung): rung for rung in (FP32, *rungs)}
    files = [(spec.GENERATOR, rung_path(build, rung), name) for name, rung in generators.items()]
    files += [
        (stage, build / f"{stage.name}.onnx", MODEL_FILE) for stage in spec.STAGES if stage != spec.GENERATOR
    ]
    for stage, source, _ in files:
        _check_onnx(source, stage)

    staged: list[tuple[Path, Path]] = []
    try:
        for stage, source, name in files:
            target = repository / stage.name / VERSION / name
            part = target.with_name(f"{name}.part")
            target.parent.mkdir(parents=True, exist_ok=True)
            staged.append((part, target))
            shutil.copyfile(source, part)
        for part, target in staged:
            os.replace(part, target)
        _remove_strangers(repository / spec.GENERATOR.name / VERSION, rung_path(build, FP32))
    except OSError as err:
        raise ExportError(f"cannot install the ONNX files into {repository}: {err}") from err
    finally:
        for part, _ in staged:
            part.unlink(missing_ok=True)


def _remove_strangers(version: Path, fp32: Path) -> None:
    """Delete rungs that come from other weights than those just installed: nobody should serve both."""
    digest = sha256(fp32)
    for path in version.glob(rung_file("*")):
        parents = {p.value for p in onnx.load(path).metadata_props if p.key == PARENT_KEY}
        if path.name != rung_file(FP32) and parents != {digest}:
            path.unlink()


def _stage_config(stage: spec.ModelSpec, choice: Choice | None = None) -> pb.ModelConfig:
    kind = choice.kind if choice else pb.ModelInstanceGroup.KIND_AUTO
    file = rung_file(choice.rung) if choice and stage == spec.GENERATOR else MODEL_FILE
    return pb.ModelConfig(
        name=stage.name,
        backend="onnxruntime",
        max_batch_size=spec.MAX_BATCH,
        input=_tensors(pb.ModelInput, stage.inputs),
        output=_tensors(pb.ModelOutput, stage.outputs),
        default_model_filename=file,
        instance_group=[
            pb.ModelInstanceGroup(name=name, count=1, kind=kind) for name in spec.INSTANCE_GROUPS
        ],
        dynamic_batching=pb.ModelDynamicBatching(
            preferred_batch_size=[spec.MAX_BATCH], max_queue_delay_microseconds=MAX_QUEUE_DELAY_US
        ),
        model_warmup=[_warmup(stage, batch) for batch in WARMUP_BATCHES],
    )


def _warmup(stage: spec.ModelSpec, batch: int) -> pb.ModelWarmup:
    return pb.ModelWarmup(
        name=f"batch_{batch}",
        batch_size=batch,
        inputs={
            tensor.name: pb.ModelWarmup.Input(
                data_type=_data_type(tensor), dims=tensor.shape(batch, WARMUP_SIZE)[1:], zero_data=True
            )
            for tensor in stage.inputs
        },
    )


def _ensemble_config() -> pb.ModelConfig:
    """The ensemble: Triton refuses instance groups and warm-up here, so the stages carry them."""
    return pb.ModelConfig(
        name=spec.ENSEMBLE.name,
        platform="ensemble",
        max_batch_size=spec.MAX_BATCH,
        input=_tensors(pb.ModelInput, spec.ENSEMBLE.inputs),
        output=_tensors(pb.ModelOutput, spec.ENSEMBLE.outputs),
        ensemble_scheduling=pb.ModelEnsembling(
            step=[
                pb.ModelEnsembling.Step(
                    model_name=stage.name,
                    model_version=-1,  # the latest
                    input_map={tensor.name: tensor.name for tensor in stage.inputs},
                    output_map={tensor.name: tensor.name for tensor in stage.outputs},
                )
                for stage in spec.STAGES
            ]
        ),
        parameters={key: pb.ModelParameter(string_value=value) for key, value in spec.PARAMETERS.items()},
    )


def _tensors(
    message: type[pb.ModelInput] | type[pb.ModelOutput], tensors: Iterable[spec.TensorSpec]
) -> list[pb.ModelInput] | list[pb.ModelOutput]:
    return [message(name=t.name, data_type=_data_type(t), dims=t.dims) for t in tensors]


def _data_type(tensor: spec.TensorSpec) -> pb.DataType:
    return pb.DataType.Value(f"TYPE_{tensor.dtype}")


def _check_onnx(source: Path, stage: spec.ModelSpec) -> None:
    """Refuse a file that the server would refuse: the native backend compares the same names and types."""
    try:
        model = onnx.load(source, load_external_data=False)
    except FileNotFoundError as err:
        raise ExportError(f"{source} does not exist: run `make export`") from err
    except (OSError, DecodeError) as err:
        raise ExportError(f"{source} is not a readable ONNX file ({err}): run `make export` again") from err

    for kind, wanted, values in (
        ("inputs", stage.inputs, model.graph.input),
        ("outputs", stage.outputs, model.graph.output),
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
