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
CPU = "cpu"  # another rung: FP32 in the operators that ONNX Runtime is fast at on a processor
PARENT_KEY = "fp32_sha256"  # in a rung's metadata: digest of the FP32 graph that it was converted from
BANNER = "# Generated from export/spec.py by `python -m export repository`; edit there.\n"

# What every instance runs before the server reports ready, so that no client pays for kernels and memory
# pools. The frame is the smallest one served: a CPU server warms up six instances before it starts.
ONNX_WARMUPS = [(batch, spec.LR_SIZES[0]) for batch in sorted({spec.BATCHES[0], spec.MAX_BATCH})]

# What TensorRT plans are recorded for as CUDA graphs, and warmed up on: by itself Triton would record the
# profile's usual size alone. A graph serves its own batch and size and no other. `graph_lower_bound` would
# let it stand in for smaller ones, padded with whatever lies in memory: harmless in the batch, where every
# number has its own graph anyway, but in height and width the convolutions would draw it into the frame.
GRAPHS = [(batch, size) for size in spec.LR_SIZES for batch in range(spec.BATCHES[0], spec.MAX_BATCH + 1)]

COMPUTE_CAPABILITIES = ("7.5", "8.0", "8.6", "8.7", "8.9", "9.0", "10.0", "10.3", "11.0", "12.0", "12.1")
"""GPUs that one repository can hold a plan for, each under a name of its own."""
PLAN_FILE = "model.plan"  # what Triton looks for on a GPU that is not among them


@dataclass(frozen=True)
class Choice:
    """What ``tritonserver --model-config-name`` can choose of ONNX files in place of ``config.pbtxt``."""

    kind: pb.ModelInstanceGroup.Kind.ValueType
    """Device of the instances; ``KIND_AUTO`` is a GPU where Triton sees one, else the CPU."""
    rungs: Mapping[str, str]
    """Stage -> rung; the others come in one form."""


CHOICES = {
    name: Choice(kind, {spec.FLOW_ALIGN.name: flow_align, spec.GENERATOR.name: generator})
    for name, kind, flow_align, generator in (
        ("cpu", pb.ModelInstanceGroup.KIND_CPU, CPU, INT8),
        ("cuda", pb.ModelInstanceGroup.KIND_GPU, FP32, FP16),
        ("fp32", pb.ModelInstanceGroup.KIND_AUTO, FP32, FP32),
    )
}
WITH_RUNGS = {stage for choice in CHOICES.values() for stage in choice.rungs}
TENSORRT = "tensorrt"  # the choice of plans in place of ONNX files

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
        files[f"{stage.name}/configs/{TENSORRT}.pbtxt"] = _plan_config(stage)
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
    """Name of a rung in the repository, beside ``model.onnx``."""
    return f"model.{rung}.onnx"


def plan_file(compute_capability: str) -> str:
    """Name of the plan for one kind of GPU in the repository; ``8.9`` -> ``model.sm89.plan``."""
    return f"model.sm{compute_capability.replace('.', '')}.plan"


def stage_path(build: Path, stage: spec.ModelSpec, rung: str = FP32) -> Path:
    """Where a stage's ONNX file lies in a build folder; FP32 goes unnamed, for every stage has it."""
    return build / (f"{stage.name}.onnx" if rung == FP32 else f"{stage.name}.{rung}.onnx")


def rung_path(build: Path, rung: str) -> Path:
    """Where a generator of one precision lies in a build folder."""
    return stage_path(build, spec.GENERATOR, rung)


def sha256(path: Path) -> str:
    """Digest of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def parent_digest(path: Path) -> str:
    """Digest of the FP32 graph that a graph says it was converted from; empty where it does not say."""
    return next((p.value for p in onnx.load(path).metadata_props if p.key == PARENT_KEY), "")


def install(build: Path, repository: Path, rungs: Mapping[str, Sequence[str]] | None = None) -> None:
    """Put every stage of a build folder into the repository: all of them, or none.

    ``model.onnx`` of each model is what ``config.pbtxt`` serves; beside it lie its rungs, by name. Rungs of
    an earlier export stay if they come from the same FP32 graph, and go if they do not. Everything is checked
    and copied next to its target first; what remains is one rename per file.

    Args:
        build: folder with ``<model>.onnx``, and ``<model>.<rung>.onnx``.
        repository: where the models lie.
        rungs: stage -> rungs to install beside FP32; the last becomes ``model.onnx``, in place of FP32.

    Raises:
        ExportError: A file is missing, unreadable, off the contract, or cannot be copied.
    """
    files = []
    for stage in spec.STAGES:
        all_rungs = (FP32, *(rungs or {}).get(stage.name, ()))
        files.append((stage, stage_path(build, stage, all_rungs[-1]), MODEL_FILE))
        if stage.name in WITH_RUNGS:
            files += [(stage, stage_path(build, stage, rung), rung_file(rung)) for rung in all_rungs]
    for stage, source, _ in files:
        _check_onnx(source, stage)

    copies = [(source, repository / stage.name / VERSION / name) for stage, source, name in files]
    try:
        _copy_all(copies)
        _remove_strangers(build, repository)
    except OSError as err:
        raise ExportError(f"cannot install the ONNX files into {repository}: {err}") from err


def install_plans(
    plans: Mapping[str, Path], identities: Mapping[str, Path], repository: Path, compute_capability: str
) -> None:
    """Put the plans of one kind of GPU into the repository, each with its identity: all of them, or none.

    Plans of other GPUs stay: Triton picks by ``cc_model_filenames``.

    Args:
        plans: model name -> plan, checked against its surroundings by the caller.
        identities: model name -> what the plan depends on, as a file.
        repository: where the models lie.
        compute_capability: of the GPU that the plans were built on, as ``8.9``.

    Raises:
        ExportError: the configurations know no such GPU, or a file cannot be copied.
    """
    if compute_capability not in COMPUTE_CAPABILITIES:
        raise ExportError(
            f"expected a GPU of compute capability {', '.join(COMPUTE_CAPABILITIES)}, found "
            f"{compute_capability}; add it to COMPUTE_CAPABILITIES in export/repository.py"
        )
    name = plan_file(compute_capability)
    copies = [(path, repository / model / VERSION / name) for model, path in plans.items()]
    copies += [(path, repository / model / VERSION / f"{name}.json") for model, path in identities.items()]
    try:
        _copy_all(copies)
    except OSError as err:
        raise ExportError(f"cannot install the plans into {repository}: {err}") from err


def _copy_all(copies: Iterable[tuple[Path, Path]]) -> None:
    """Copy every source next to its target, and only then rename them all."""
    staged: list[tuple[Path, Path]] = []
    try:
        for source, target in copies:
            part = target.with_name(f"{target.name}.part")
            target.parent.mkdir(parents=True, exist_ok=True)
            staged.append((part, target))
            shutil.copyfile(source, part)
        for part, target in staged:
            os.replace(part, target)
    finally:
        for part, _ in staged:
            part.unlink(missing_ok=True)


def _remove_strangers(build: Path, repository: Path) -> None:
    """Delete rungs and plans of other weights than those just installed: nobody should serve both."""
    for stage in spec.STAGES:
        digest = sha256(stage_path(build, stage))
        version = repository / stage.name / VERSION
        for path in version.glob(rung_file("*")):
            if path.name != rung_file(FP32) and parent_digest(path) != digest:
                path.unlink()
        for path in version.glob(plan_file("*")):
            identity = path.with_name(f"{path.name}.json")
            if not identity.is_file() or digest not in identity.read_text():
                path.unlink()
                identity.unlink(missing_ok=True)


def _stage_config(stage: spec.ModelSpec, choice: Choice | None = None) -> pb.ModelConfig:
    kind = choice.kind if choice else pb.ModelInstanceGroup.KIND_AUTO
    file = rung_file(choice.rungs[stage.name]) if choice and stage.name in choice.rungs else MODEL_FILE
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
            preferred_batch_size=[spec.MAX_BATCH], max_queue_delay_microseconds=spec.MAX_QUEUE_DELAY_US
        ),
        model_warmup=[_warmup(f"batch_{batch}", stage, batch, size) for batch, size in ONNX_WARMUPS],
        # For a clear refusal by the embedded server; NVIDIA's backends do not look at it.
        parameters={"multiple_of": pb.ModelParameter(string_value=str(spec.MULTIPLE_OF))}
        if stage.inputs[0] == spec.LR_WINDOW
        else {},
    )


def _plan_config(stage: spec.ModelSpec) -> pb.ModelConfig:
    config = _stage_config(stage, Choice(pb.ModelInstanceGroup.KIND_GPU, {}))
    config.platform = "tensorrt_plan"
    config.backend = "tensorrt"
    config.default_model_filename = PLAN_FILE
    for capability in COMPUTE_CAPABILITIES:
        config.cc_model_filenames[capability] = plan_file(capability)
    cuda = config.optimization.cuda
    cuda.graphs = True
    cuda.output_copy_stream = True  # answers leave while the next batch computes
    Shape = pb.ModelOptimizationPolicy.Cuda.GraphSpec.Shape  # noqa: N806
    for batch, size in GRAPHS:
        graph = cuda.graph_spec.add(batch_size=batch)
        for tensor in stage.inputs:
            graph.input[tensor.name].CopyFrom(Shape(dim=tensor.shape(batch, size)[1:]))
    del config.model_warmup[:]
    config.model_warmup.extend(
        _warmup("batch_{}_{}x{}".format(batch, *size), stage, batch, size) for batch, size in GRAPHS
    )
    return config


def _warmup(name: str, stage: spec.ModelSpec, batch: int, lr_size: spec.Size) -> pb.ModelWarmup:
    return pb.ModelWarmup(
        name=name,
        batch_size=batch,
        inputs={
            tensor.name: pb.ModelWarmup.Input(
                data_type=_data_type(tensor), dims=tensor.shape(batch, lr_size)[1:], zero_data=True
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
