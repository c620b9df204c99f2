"""The committed configurations: equal to the contract, and known to Triton's protobuf."""

from __future__ import annotations

from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from export import spec
from export.model_config import COMPUTE_CAPABILITIES, config_text
from export.repository import CONTRACT_FILE, committed_configs
from mst_gan_client.serving.trail import PRIORITIES

COMMITTED = Path(__file__).parents[2] / "model_repository"
STAGE_NAMES = [stage.name for stage in spec.STAGES]


def parse(name: str) -> pb.ModelConfig:
    """The committed config; a field that Triton's protobuf does not have raises."""
    file = CONTRACT_FILE if name == spec.ENSEMBLE.name else f"{name}/config.pbtxt"
    return text_format.Parse((COMMITTED / file).read_text(), pb.ModelConfig())


def tensors(entries: list[pb.ModelInput] | list[pb.ModelOutput]) -> dict[str, tuple[int, tuple[int, ...]]]:
    return {entry.name: (entry.data_type, tuple(entry.dims)) for entry in entries}


@pytest.mark.parametrize("path", committed_configs())
def test_committed_config_is_the_generated_one(path: str) -> None:
    assert (COMMITTED / path).read_text() == config_text(committed_configs()[path])


@pytest.mark.parametrize("path", committed_configs())
def test_committed_config_parses_to_what_was_generated(path: str) -> None:
    assert text_format.Parse((COMMITTED / path).read_text(), pb.ModelConfig()) == committed_configs()[path]


def test_every_config_of_the_repository_is_generated() -> None:
    found = {str(path.relative_to(COMMITTED)) for path in COMMITTED.rglob("*.pbtxt")}
    exported = f"{spec.ENSEMBLE.name}/config"  # of the last export here; not committed
    assert {path for path in found if not path.startswith(exported)} == set(committed_configs())
    assert {f"{name}/config.pbtxt" for name in STAGE_NAMES} | {CONTRACT_FILE} <= found
    assert (COMMITTED / spec.ENSEMBLE.name / "1").is_dir()  # Triton wants a version even of an ensemble


@pytest.mark.parametrize("name", STAGE_NAMES)
def test_stage_batches_on_two_streams(name: str) -> None:
    config = parse(name)

    assert config.backend == "onnxruntime"
    assert config.default_model_filename == "model.onnx"
    assert config.max_batch_size == 4
    assert list(config.dynamic_batching.preferred_batch_size) == [4]
    assert config.dynamic_batching.max_queue_delay_microseconds == spec.MAX_QUEUE_DELAY_US
    batching = config.dynamic_batching
    assert (batching.priority_levels, batching.default_priority_level) == (2, spec.BATCH)
    assert set(batching.priority_queue_policy) == {spec.LIVE, spec.BATCH}
    for level, policy in batching.priority_queue_policy.items():
        assert policy.timeout_action == pb.ModelQueuePolicy.REJECT
        assert policy.default_timeout_microseconds == spec.QUEUE_TIMEOUTS_US[level]
        assert policy.allow_timeout_override
    assert [(group.name, group.count, group.kind) for group in config.instance_group] == [
        ("stream_0", 1, pb.ModelInstanceGroup.KIND_AUTO),
        ("stream_1", 1, pb.ModelInstanceGroup.KIND_AUTO),
    ]


@pytest.mark.parametrize("stage", spec.STAGES, ids=STAGE_NAMES)
def test_stage_warms_up_single_windows_and_full_batches(stage: spec.ModelSpec) -> None:
    warmups = parse(stage.name).model_warmup

    assert [warmup.batch_size for warmup in warmups] == [1, 4]
    for warmup in warmups:
        assert set(warmup.inputs) == {tensor.name for tensor in stage.inputs}
        for tensor in stage.inputs:
            sample = warmup.inputs[tensor.name]
            assert sample.data_type == pb.DataType.Value(f"TYPE_{tensor.dtype}")
            assert tuple(sample.dims) == tensor.shape(1, (16, 16))[1:]
            assert sample.zero_data


def test_ensemble_connects_its_stages_by_type_and_shape() -> None:
    ensemble = parse(spec.ENSEMBLE.name)
    known = tensors(ensemble.input)
    unused = set(known)

    for step in ensemble.ensemble_scheduling.step:
        stage = parse(step.model_name)
        assert stage.max_batch_size == ensemble.max_batch_size
        inputs, outputs = tensors(stage.input), tensors(stage.output)
        assert set(step.input_map) == set(inputs)
        assert set(step.output_map) == set(outputs)
        for name, tensor in step.input_map.items():
            assert known[tensor] == inputs[name], f"{step.model_name} reads {tensor} as {name}"
            unused.discard(tensor)
        for name, tensor in step.output_map.items():
            assert tensor not in known
            known[tensor] = outputs[name]
            unused.add(tensor)

    assert tensors(ensemble.output) == {name: known[name] for name in unused}  # Triton refuses unused tensors


def test_ensemble_publishes_the_contract_and_nothing_triton_refuses() -> None:
    ensemble = parse(spec.ENSEMBLE.name)

    assert {key: value.string_value for key, value in ensemble.parameters.items()} == spec.PARAMETERS
    assert not ensemble.instance_group
    assert not ensemble.model_warmup
    assert not ensemble.HasField("dynamic_batching")


@pytest.mark.parametrize(
    ("name", "kind", "precisions"),
    [
        ("cpu", pb.ModelInstanceGroup.KIND_CPU, {"flow_align": "cpu", "generator": "int8"}),
        ("cuda", pb.ModelInstanceGroup.KIND_GPU, {"flow_align": "fp32", "generator": "fp16"}),
        ("fp32", pb.ModelInstanceGroup.KIND_AUTO, {"flow_align": "fp32", "generator": "fp32"}),
    ],
)
def test_alternatives_differ_in_device_file_and_limit_of_the_queue_alone(
    name: str, kind: int, precisions: dict[str, str]
) -> None:
    files = committed_configs()
    for stage in STAGE_NAMES:
        config = files[f"{stage}/config.pbtxt"]
        alternative = files.get(f"{stage}/configs/{name}.pbtxt", config)  # as Triton falls back
        assert {group.kind for group in alternative.instance_group} == {kind}
        file = f"model.{precisions[stage]}.onnx" if stage in precisions else "model.onnx"
        assert alternative.default_model_filename == file
        same = pb.ModelConfig()
        same.CopyFrom(alternative)
        for group in same.instance_group:
            group.kind = pb.ModelInstanceGroup.KIND_AUTO
        same.default_model_filename = config.default_model_filename
        limit = spec.MAX_QUEUE_SIZE if name == "cuda" else 0  # NVIDIA's image alone serves that
        for policy in same.dynamic_batching.priority_queue_policy.values():
            assert policy.max_queue_size == limit
            policy.max_queue_size = 0
        assert same == config


SIZES = [(16, 16), (360, 640), (720, 1280)]


@pytest.mark.parametrize("stage", spec.STAGES, ids=STAGE_NAMES)
def test_plans_are_recorded_and_warmed_up_for_every_batch_and_size(stage: spec.ModelSpec) -> None:
    path = COMMITTED / stage.name / "configs/tensorrt.pbtxt"
    config = text_format.Parse(path.read_text(), pb.ModelConfig())
    wanted = {
        (batch, tuple((tensor.name, tensor.shape(batch, size)[1:]) for tensor in stage.inputs))
        for batch in (1, 2, 3, 4)
        for size in SIZES
    }
    cuda = config.optimization.cuda
    assert cuda.graphs
    assert len(cuda.graph_spec) == len(config.model_warmup) == 12
    for batch, inputs in (
        *((graph.batch_size, {k: v.dim for k, v in graph.input.items()}) for graph in cuda.graph_spec),
        *((w.batch_size, {k: v.dims for k, v in w.inputs.items()}) for w in config.model_warmup),
    ):
        assert (batch, tuple((t.name, tuple(inputs[t.name])) for t in stage.inputs)) in wanted
        assert inputs.keys() == {tensor.name for tensor in stage.inputs}
    assert {
        (graph.batch_size, tuple((t.name, tuple(graph.input[t.name].dim)) for t in stage.inputs))
        for graph in cuda.graph_spec
    } == wanted
    assert len({warmup.name for warmup in config.model_warmup}) == 12
    # An inexact graph would let the convolutions see what lies in memory beside the frame.
    assert not any(graph.HasField("graph_lower_bound") for graph in cuda.graph_spec)


@pytest.mark.parametrize("stage", spec.STAGES, ids=STAGE_NAMES)
def test_plans_are_chosen_by_gpu(stage: spec.ModelSpec) -> None:
    config = committed_configs()[f"{stage.name}/configs/tensorrt.pbtxt"]
    assert (config.backend, config.platform) == ("tensorrt", "tensorrt_plan")
    assert config.default_model_filename == "model.plan"
    assert dict(config.cc_model_filenames)["8.9"] == "model.sm89.plan"
    assert len(set(config.cc_model_filenames.values())) == len(COMPUTE_CAPABILITIES)
    assert {group.kind for group in config.instance_group} == {pb.ModelInstanceGroup.KIND_GPU}
    default = parse(stage.name)  # what clients see is the same
    assert config.input == default.input and config.output == default.output
    for policy in config.dynamic_batching.priority_queue_policy.values():
        assert policy.max_queue_size == spec.MAX_QUEUE_SIZE
        policy.max_queue_size = 0  # the embedded server could hang at a limit
    assert config.dynamic_batching == default.dynamic_batching


def test_clients_send_the_levels_that_the_queues_have() -> None:
    assert PRIORITIES == {"live": spec.LIVE, "batch": spec.BATCH}
