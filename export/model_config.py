"""Triton's ``config.pbtxt`` of every model, computed from ``spec``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from export import spec

MODEL_FILE = "model.onnx"  # what config.pbtxt serves: the best that the last export made for its machine
FP32, FP16, INT8 = "fp32", "fp16", "int8"  # precisions of a generator
CPU = "cpu"  # FP32 in the operators that ONNX Runtime's CPU provider is fast at: a form of flow_align
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
class ServingConfig:
    """What ``tritonserver --model-config-name`` can choose of ONNX files in place of ``config.pbtxt``."""

    kind: pb.ModelInstanceGroup.Kind.ValueType
    """Device of the instances; ``KIND_AUTO`` is a GPU where Triton sees one, else the CPU."""
    precisions: Mapping[str, str]
    """Stage -> precision; the others come in one form."""
    max_queue_size: int = 0
    """Requests of one priority in a stage's queue; 0: no limit. Inside an ensemble a full queue could leave
    requests without an answer until Triton 2.67 (26.03; triton-inference-server/core#470), so only targets
    that need NVIDIA's image have one: the embedded server is 2.51."""


SERVING_CONFIGS = {
    name: ServingConfig(kind, {spec.FLOW_ALIGN.name: flow_align, spec.GENERATOR.name: generator}, limit)
    for name, kind, flow_align, generator, limit in (
        ("cpu", pb.ModelInstanceGroup.KIND_CPU, CPU, INT8, 0),
        ("cuda", pb.ModelInstanceGroup.KIND_GPU, FP32, FP16, spec.MAX_QUEUE_SIZE),
        ("fp32", pb.ModelInstanceGroup.KIND_AUTO, FP32, FP32, 0),
    )
}
WITH_PRECISIONS = {stage for config in SERVING_CONFIGS.values() for stage in config.precisions}
TENSORRT = "tensorrt"  # the config that serves plans in place of ONNX files


def stage_configs() -> dict[str, pb.ModelConfig]:
    """Path below the repository -> configuration, of the three stages."""
    files = {}
    for stage in spec.STAGES:
        default = files[f"{stage.name}/config.pbtxt"] = _stage_config(stage)
        for name, choice in SERVING_CONFIGS.items():
            config = _stage_config(stage, choice)
            if config != default:  # Triton falls back to config.pbtxt
                files[f"{stage.name}/configs/{name}.pbtxt"] = config
        files[f"{stage.name}/configs/{TENSORRT}.pbtxt"] = _plan_config(stage)
    return files


def ensemble_config(identity: Mapping[str, str]) -> pb.ModelConfig:
    """The ensemble: Triton refuses instance groups and warm-up here, so the stages carry them.

    Args:
        identity: values of ``spec.IDENTITY``, or none of them.
    """
    config = _ensemble(spec.ENSEMBLE, spec.STAGES)
    for key, value in {**spec.PARAMETERS, **identity}.items():
        config.parameters[key].string_value = value
    return config


def stream_configs(identity: Mapping[str, str]) -> dict[str, pb.ModelConfig]:
    """Path below the repository -> configuration, of the streaming ensemble and its stages with a state.

    Triton passes START, END and the correlation id of an ensemble's request on to every stage (core:
    ``EnsembleContext::InitStep``). Its sequence batcher takes one frame per request, keeps a sequence in a
    slot of one instance, and has further sequences wait. Warm-up is left out: it belongs to no sequence.

    Args:
        identity: values of ``spec.IDENTITY``, or none of them.
    """
    configs = {f"{stage.name}/config.pbtxt": _sequence_config(stage) for stage in spec.STREAM_STAGES}
    ensemble = _ensemble(spec.STREAM_ENSEMBLE, (*spec.STREAM_STAGES, spec.PIXEL_SHUFFLE))
    ensemble.max_batch_size = 1
    for key, value in {**spec.STREAM_PARAMETERS, **identity}.items():
        ensemble.parameters[key].string_value = value
    return {**configs, f"{spec.STREAM_ENSEMBLE.name}/config.pbtxt": ensemble}


def config_text(config: pb.ModelConfig) -> str:
    """The text of a configuration file, with a first line that says where to edit it."""
    text: str = text_format.MessageToString(config, use_short_repeated_primitives=True)
    return BANNER + text


def precision_file(precision: str) -> str:
    """Name of the file of one precision in the repository, beside ``model.onnx``."""
    return f"model.{precision}.onnx"


def plan_file(compute_capability: str) -> str:
    """Name of the plan for one kind of GPU in the repository; ``8.9`` -> ``model.sm89.plan``."""
    return f"model.sm{compute_capability.replace('.', '')}.plan"


def _ensemble(ensemble: spec.ModelSpec, stages: Iterable[spec.ModelSpec]) -> pb.ModelConfig:
    return pb.ModelConfig(
        name=ensemble.name,
        platform="ensemble",
        max_batch_size=spec.MAX_BATCH,
        input=_tensors(pb.ModelInput, ensemble.inputs),
        output=_tensors(pb.ModelOutput, ensemble.outputs),
        ensemble_scheduling=pb.ModelEnsembling(
            step=[
                pb.ModelEnsembling.Step(
                    model_name=stage.name,
                    model_version=-1,  # the latest
                    input_map={tensor.name: tensor.name for tensor in stage.inputs},
                    output_map={tensor.name: tensor.name for tensor in stage.outputs},
                )
                for stage in stages
            ]
        ),
    )


def _sequence_config(stage: spec.StreamSpec) -> pb.ModelConfig:
    config = _stage_config(stage)
    config.max_batch_size = stage.max_batch
    config.ClearField("dynamic_batching")
    config.ClearField("model_warmup")
    if stage.inputs[0] == spec.LR_FRAME:
        config.parameters["multiple_of"].string_value = str(spec.MULTIPLE_OF)
    batching = config.sequence_batching
    batching.max_sequence_idle_microseconds = spec.MAX_IDLE_US
    batching.oldest.max_candidate_sequences = spec.SEQUENCES_PER_INSTANCE
    batching.oldest.preferred_batch_size.append(stage.max_batch)
    batching.oldest.max_queue_delay_microseconds = spec.MAX_QUEUE_DELAY_US
    if stage.starts:
        control = batching.control_input.add(name=spec.START.name).control.add()
        control.kind = pb.ModelSequenceBatching.Control.CONTROL_SEQUENCE_START
        control.fp32_false_true.extend((0, 1))
    tensor = stage.state.input
    state = batching.state.add(
        input_name=tensor.name,
        output_name=stage.state.output.name,
        data_type=_data_type(tensor),
        dims=tensor.dims,
    )
    state.initial_state.add(
        name="zeros",
        data_type=_data_type(tensor),
        dims=[1 if side == -1 else side for side in tensor.dims],
        zero_data=True,
    )
    return config


def _stage_config(stage: spec.ModelSpec, choice: ServingConfig | None = None) -> pb.ModelConfig:
    kind = choice.kind if choice else pb.ModelInstanceGroup.KIND_AUTO
    file = MODEL_FILE
    if choice and stage.name in choice.precisions:
        file = precision_file(choice.precisions[stage.name])
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
        dynamic_batching=_dynamic_batching(choice.max_queue_size if choice else 0),
        model_warmup=[_warmup(f"batch_{batch}", stage, batch, size) for batch, size in ONNX_WARMUPS],
        # For a clear refusal by the embedded server; NVIDIA's backends do not look at it.
        parameters={"multiple_of": pb.ModelParameter(string_value=str(spec.MULTIPLE_OF))}
        if stage.inputs[0] == spec.LR_WINDOW
        else {},
    )


def _dynamic_batching(max_queue_size: int) -> pb.ModelDynamicBatching:
    """Full batches first; live requests before others, each with a longest time to wait."""
    policies = {
        level: pb.ModelQueuePolicy(
            timeout_action=pb.ModelQueuePolicy.REJECT,
            default_timeout_microseconds=timeout_us,
            allow_timeout_override=True,  # by the request's own timeout, if that is shorter
            max_queue_size=max_queue_size,
        )
        for level, timeout_us in spec.QUEUE_TIMEOUTS_US.items()
    }
    return pb.ModelDynamicBatching(
        preferred_batch_size=[spec.MAX_BATCH],
        max_queue_delay_microseconds=spec.MAX_QUEUE_DELAY_US,
        priority_levels=len(policies),
        default_priority_level=spec.BATCH,
        priority_queue_policy=policies,
    )


def _plan_config(stage: spec.ModelSpec) -> pb.ModelConfig:
    config = _stage_config(stage, ServingConfig(pb.ModelInstanceGroup.KIND_GPU, {}, spec.MAX_QUEUE_SIZE))
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


def _tensors(
    message: type[pb.ModelInput] | type[pb.ModelOutput], tensors: Iterable[spec.TensorSpec]
) -> list[pb.ModelInput] | list[pb.ModelOutput]:
    return [message(name=t.name, data_type=_data_type(t), dims=t.dims) for t in tensors]


def _data_type(tensor: spec.TensorSpec) -> pb.DataType:
    return pb.DataType.Value(f"TYPE_{tensor.dtype}")
