"""Temporary copies of the model repository with another setting; the committed one is never touched."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx.compose
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from perf.errors import PerfError

ENSEMBLE, FUSED = "mst_gan", "fused"
VERSION = "1"


@dataclass(frozen=True)
class Serving:
    """How the models are served; None leaves a setting as it is committed."""

    target: str | None = None
    """Names ``<model>/configs/<target>.pbtxt``; models without that file keep their own config."""
    queue_delay_us: int | None = None
    instances: int | None = None
    """Instance groups of each stage."""
    form: str = "ensemble"
    """``ensemble``, or ``fused``: all stages in one graph, for comparison."""
    batching: bool = True
    """False: every request runs alone."""

    @property
    def model(self) -> str:
        """Name of the model that answers requests."""
        return FUSED if self.form == FUSED else ENSEMBLE


def read_configs(repository: Path, target: str | None) -> dict[str, pb.ModelConfig]:
    """Model name -> the configuration that Triton takes for this target."""
    configs = {}
    for model in sorted(path.parent for path in repository.glob("*/config.pbtxt")):
        chosen = model / "configs" / f"{target}.pbtxt"
        path = chosen if target and chosen.is_file() else model / "config.pbtxt"
        configs[model.name] = text_format.Parse(path.read_text(), pb.ModelConfig())
    if ENSEMBLE not in configs:
        raise PerfError(f"expected {ENSEMBLE}/config.pbtxt in {repository}, found none: run `make export`")
    return configs


def stage_names(configs: dict[str, pb.ModelConfig]) -> list[str]:
    """The composing models, in the order of the ensemble."""
    return [step.model_name for step in configs[ENSEMBLE].ensemble_scheduling.step]


def model_file(repository: Path, config: pb.ModelConfig) -> Path:
    """The file that a stage is served from; of plans for several GPUs, the first that is there."""
    names = [config.default_model_filename or "model.onnx", *config.cc_model_filenames.values()]
    paths = [repository / config.name / VERSION / name for name in names]
    found = next((path for path in paths if path.is_file()), None)
    if found is None:
        raise PerfError(f"expected {paths[0]}, found no such file: run `make export` for this target")
    return found


def fingerprints(repository: Path, target: str | None) -> dict[str, str]:
    """Stage -> file name, size and hash of what is served, so that results name their model."""
    configs = read_configs(repository, target)
    described = {}
    for name in stage_names(configs):
        path = model_file(repository, configs[name])
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        described[name] = f"{path.name}, {path.stat().st_size / 1e6:.1f} MB, sha256 {digest}"
    return described


def write_variant(repository: Path, folder: Path, serving: Serving) -> None:
    """Fill ``folder`` with the repository under these settings; model files are links."""
    configs = read_configs(repository, serving.target)
    stages = stage_names(configs)
    for name in stages:
        model_file(repository, configs[name])
    if serving.form == FUSED:
        configs = {FUSED: _fuse(repository, folder, configs, stages)}
    for name, config in configs.items():
        if name in stages or name == FUSED:
            if serving.queue_delay_us is not None:
                config.dynamic_batching.max_queue_delay_microseconds = serving.queue_delay_us
            if serving.instances is not None:
                _set_instances(config, serving.instances)
            if not serving.batching:
                config.ClearField("dynamic_batching")
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "config.pbtxt").write_text(text_format.MessageToString(config))
        if name != FUSED:
            (folder / name / VERSION).symlink_to((repository / name / VERSION).resolve())


def _set_instances(config: pb.ModelConfig, count: int) -> None:
    groups = [pb.ModelInstanceGroup() for _ in range(count)]
    for index, group in enumerate(groups):
        group.CopyFrom(config.instance_group[0])
        group.name = f"stream_{index}"
    del config.instance_group[:]
    config.instance_group.extend(groups)


def _fuse(
    repository: Path, folder: Path, configs: dict[str, pb.ModelConfig], stages: Sequence[str]
) -> pb.ModelConfig:
    """Write one graph of all stages, and return its configuration.

    Tensors between stages have one name in the whole contract, so the graphs join by their names alone.
    """
    target = folder / FUSED / VERSION / "model.onnx"
    target.parent.mkdir(parents=True)
    onnx.save(
        fuse_graphs([model_file(repository, configs[name]) for name in stages], configs[ENSEMBLE]), target
    )
    config = pb.ModelConfig()
    config.CopyFrom(configs[stages[0]])
    config.name = FUSED
    config.default_model_filename = target.name
    del config.output[:]
    config.output.extend(configs[ENSEMBLE].output)
    return config


def fuse_graphs(paths: Sequence[Path], ensemble: pb.ModelConfig) -> onnx.ModelProto:
    """Join the stages' ONNX files into one with the ensemble's inputs and outputs."""
    models = [
        # Nodes and inner tensors of different files may share names; inputs and outputs must.
        onnx.compose.add_prefix(
            onnx.load(path), f"{path.parent.parent.name}_", rename_inputs=False, rename_outputs=False
        )
        for path in paths
    ]
    graphs = [model.graph for model in models]
    outputs = {output.name for output in ensemble.output}
    graph = onnx.helper.make_graph(
        [node for graph in graphs for node in graph.node],
        FUSED,
        [value for value in graphs[0].input],
        [value for graph in graphs for value in graph.output if value.name in outputs],
        [tensor for graph in graphs for tensor in graph.initializer],
    )
    opsets = {opset.domain: opset for model in models for opset in model.opset_import}
    ir_version = max(model.ir_version for model in models)
    fused = onnx.helper.make_model(graph, opset_imports=list(opsets.values()), ir_version=ir_version)
    fused.functions.extend(function for model in models for function in model.functions)
    return fused
