"""A model repository: installed whole or not at all, and it says which weights it serves."""

from __future__ import annotations

import json
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from google.protobuf import text_format
from tritonclient.grpc import InferenceServerClient
from tritonclient.grpc import model_config_pb2 as pb

from deploy.embedded.server import TritonServer
from export import spec
from export.errors import ExportError
from export.repository import (
    PARENT_KEY,
    Weights,
    install,
    install_plans,
    sha256,
    weights_of,
    write_configs,
)

COMMITTED = Path(__file__).parents[2] / "model_repository"
STAGE_NAMES = [stage.name for stage in spec.STAGES]
WEIGHTS = Weights("mst_gan_toy", "ab" * 32)


@pytest.fixture
def build(toy_repository: Path, tmp_path: Path) -> Path:
    """A build folder with one valid ONNX file per stage."""
    folder = tmp_path / "build"
    folder.mkdir()
    for name in STAGE_NAMES:
        (folder / f"{name}.onnx").write_bytes((toy_repository / name / "1/model.onnx").read_bytes())
    return folder


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A repository with older files installed."""
    folder = tmp_path / "model_repository"
    write_configs(folder)
    for name in STAGE_NAMES:
        (folder / name / "1").mkdir()
        (folder / name / "1/model.onnx").write_bytes(b"old " + name.encode())
    return folder


def published(models: Path, target: str | None = None) -> dict[str, str]:
    """What an installed ensemble publishes beside the contract."""
    path = models / spec.ENSEMBLE.name / (f"configs/{target}.pbtxt" if target else "config.pbtxt")
    config = text_format.Parse(path.read_text(), pb.ModelConfig())
    parameters = {key: value.string_value for key, value in config.parameters.items()}
    assert spec.PARAMETERS.items() <= parameters.items()
    return {key: parameters[key] for key in parameters.keys() - spec.PARAMETERS.keys()}


def identity_text(graph: str, digest: str = "") -> str:
    return json.dumps({"graph": graph, "fp32_sha256": digest})


@pytest.fixture
def plans(tmp_path: Path) -> dict[str, Path]:
    """Plans whose content plays no part, beside their identities."""
    folder = tmp_path / "plans"
    folder.mkdir()
    for name in STAGE_NAMES:
        (folder / f"{name}.plan").write_bytes(name.encode())
        (folder / f"{name}.json").write_text(identity_text(f"{name}.int8" if name == "generator" else name))
    return {name: folder / f"{name}.plan" for name in STAGE_NAMES}


def test_plans_of_several_gpus_lie_side_by_side(plans: dict[str, Path], models: Path) -> None:
    identities = {name: path.with_suffix(".json") for name, path in plans.items()}
    for gpu in ("8.9", "12.0"):
        install_plans(plans, identities, models, gpu, WEIGHTS)
    assert installed(models, "generator") == [
        "model.onnx", "model.sm120.plan", "model.sm120.plan.json", "model.sm89.plan", "model.sm89.plan.json",
    ]  # fmt: skip
    assert (models / "generator/1/model.sm89.plan").read_bytes() == b"generator"
    with pytest.raises(ExportError, match=r"expected a GPU of compute capability 7.5, .*, found 6.1; add it"):
        install_plans(plans, identities, models, "6.1", WEIGHTS)


def test_all_plans_are_installed_or_none(plans: dict[str, Path], models: Path) -> None:
    identities = {name: path.with_suffix(".json") for name, path in plans.items()}
    identities[STAGE_NAMES[-1]].unlink()
    with pytest.raises(ExportError, match="cannot install the plans"):
        install_plans(plans, identities, models, "8.9", WEIGHTS)
    assert_old_files(models)


def test_plans_go_when_other_weights_come(build: Path, plans: dict[str, Path], models: Path) -> None:
    identities = {name: path.with_suffix(".json") for name, path in plans.items()}
    for name, path in identities.items():
        path.write_text(identity_text(name, sha256(build / f"{name}.onnx")))
    identities["generator"].write_text(identity_text("generator.int8", "0" * 64))
    install_plans(plans, identities, models, "8.9", WEIGHTS)
    install(build, models, WEIGHTS)
    assert "model.sm89.plan" in installed(models, "flow_align")
    assert not (models / "mst_gan/configs/tensorrt.pbtxt").exists()
    assert installed(models, "generator") == ["model.fp32.onnx", "model.onnx"]


def add_precision(build: Path, stage: str, precision: str) -> Path:
    """A graph that says it was made from the stage's in the build folder."""
    parent, path = build / f"{stage}.onnx", build / f"{stage}.{precision}.onnx"
    model = onnx.load(parent)
    onnx.helper.set_model_props(model, {PARENT_KEY: sha256(parent)})
    onnx.save(model, path)
    return path


def test_install_replaces_every_file(build: Path, models: Path) -> None:
    install(build, models, WEIGHTS)

    for name in STAGE_NAMES:
        assert (models / name / "1/model.onnx").read_bytes() == (build / f"{name}.onnx").read_bytes()
    assert installed(models, "generator") == ["model.fp32.onnx", "model.onnx"]
    assert installed(models, "pixel_shuffle") == ["model.onnx"]


def identity(precision: str, weights: Weights = WEIGHTS) -> dict[str, str]:
    version = tomllib.loads((COMMITTED.parent / "pyproject.toml").read_text())["project"]["version"]
    return {
        "weights_digest": weights.digest, "weights_name": weights.name, "precision": precision,
        "version": version,
    }  # fmt: skip


def test_the_ensemble_publishes_its_weights_for_every_target(build: Path, models: Path) -> None:
    assert published(models) == {}
    add_precision(build, "generator", "int8")
    install(build, models, WEIGHTS, {"generator": ["int8"]})
    served = {None: "int8", "cpu": "int8", "cuda": "fp16", "fp32": "fp32"}
    assert {target: published(models, target) for target in served} == {
        target: identity(precision) for target, precision in served.items()
    }
    write_configs(models)  # as after an update of the project
    assert published(models) == identity("int8")
    other = Weights("other", "cd" * 32)
    install(build, models, other)
    assert published(models) == identity("fp32", other)
    assert published(models, "cuda") == identity("fp16", other)


def test_the_ensemble_names_every_precision_of_its_plans(plans: dict[str, Path], models: Path) -> None:
    identities = {name: path.with_suffix(".json") for name, path in plans.items()}
    install_plans(plans, identities, models, "8.9", WEIGHTS)
    assert published(models, "tensorrt") == identity("int8")
    identities["generator"].write_text(identity_text("generator.fp16"))
    install_plans(plans, identities, models, "12.0", WEIGHTS)
    assert published(models, "tensorrt") == identity("fp16, int8")
    install_plans(plans, identities, models, "8.9", WEIGHTS)
    assert published(models, "tensorrt") == identity("fp16")


def test_export_leaves_the_checkout_clean() -> None:
    """All that an export writes is ignored by git, and the committed files are as generated."""
    ensemble = f"model_repository/{spec.ENSEMBLE.name}"
    written = [f"{ensemble}/config.pbtxt", f"{ensemble}/configs/cpu.pbtxt"]
    written += [f"model_repository/{name}/1/model.onnx" for name in STAGE_NAMES]
    ignored = git("check-ignore", "--no-index", *written)
    assert ignored == written
    assert git("ls-files", ensemble) == [f"{ensemble}/1/.gitkeep", f"{ensemble}/contract.pbtxt"]


def git(*arguments: str) -> list[str]:
    found = subprocess.run(["git", *arguments], cwd=COMMITTED.parent, text=True, capture_output=True)
    if found.returncode == 128:
        pytest.skip("not a git checkout")
    return found.stdout.splitlines()


@pytest.mark.parametrize(("stage", "precision"), [("generator", "int8"), ("flow_align", "cpu")])
def test_the_last_precision_becomes_the_model(build: Path, models: Path, stage: str, precision: str) -> None:
    path = add_precision(build, stage, precision)
    install(build, models, WEIGHTS, {stage: [precision]})

    version = models / stage / "1"
    assert set(installed(models, stage)) == {"model.fp32.onnx", f"model.{precision}.onnx", "model.onnx"}
    assert (version / "model.onnx").read_bytes() == path.read_bytes()
    assert (version / f"model.{precision}.onnx").read_bytes() == path.read_bytes()
    assert (version / "model.fp32.onnx").read_bytes() == (build / f"{stage}.onnx").read_bytes()


@pytest.mark.parametrize(("stage", "precision"), [("generator", "int8"), ("flow_align", "cpu")])
def test_precisions_stay_with_their_weights_and_go_with_others(
    build: Path, models: Path, stage: str, precision: str
) -> None:
    add_precision(build, stage, precision)
    install(build, models, WEIGHTS, {stage: [precision]})
    install(build, models, WEIGHTS)
    assert f"model.{precision}.onnx" in installed(models, stage)

    fp32 = onnx.load(build / f"{stage}.onnx")
    fp32.doc_string = "other weights"
    onnx.save(fp32, build / f"{stage}.onnx")
    install(build, models, WEIGHTS)
    assert installed(models, stage) == ["model.fp32.onnx", "model.onnx"]


def installed(models: Path, name: str) -> list[str]:
    return sorted(path.name for path in (models / name / "1").iterdir())


def spoil_missing(path: Path) -> None:
    path.unlink()


def spoil_truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def spoil_empty(path: Path) -> None:
    path.write_bytes(b"")


def spoil_names(path: Path) -> None:
    model = onnx.load(path)
    model.graph.output[0].name = "hr"
    onnx.save(model, path)


def spoil_type(path: Path) -> None:
    model = onnx.load(path)
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    onnx.save(model, path)


def spoil_external(path: Path) -> None:
    model = onnx.load(path)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(1, np.float32), "weight"))
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_missing, "does not exist: run `make export`"),
        (spoil_truncated, "is not a readable ONNX file"),
        (spoil_empty, "expected inputs subpixels UINT8, found none"),
        (spoil_names, "expected outputs hr_frame UINT8, found hr UINT8"),
        (spoil_type, "expected inputs subpixels UINT8, found subpixels FLOAT16"),
        (spoil_external, "found weights stored outside it"),
    ],
)
def test_install_keeps_the_old_files_when_one_is_bad(
    build: Path, models: Path, spoil: Callable[[Path], None], message: str
) -> None:
    spoil(build / f"{STAGE_NAMES[-1]}.onnx")

    with pytest.raises(ExportError, match=message):
        install(build, models, WEIGHTS)

    assert_old_files(models)


def test_install_keeps_the_old_files_when_a_copy_fails(
    build: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Disk full at the last file: what was copied before is cleared away."""

    def copyfile(source: Path, target: Path) -> None:
        target.write_bytes(source.read_bytes()[:10])
        if source.stem == STAGE_NAMES[-1]:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("export.repository.shutil.copyfile", copyfile)
    with pytest.raises(ExportError, match="No space left on device"):
        install(build, models, WEIGHTS)

    assert_old_files(models)


def assert_old_files(models: Path) -> None:
    for name in STAGE_NAMES:
        assert (models / name / "1/model.onnx").read_bytes() == b"old " + name.encode()
        assert [path.name for path in (models / name / "1").iterdir()] == ["model.onnx"]


@pytest.mark.server
@pytest.mark.parametrize(
    ("options", "flow_align", "generator", "precision"),
    [
        ((), "model.onnx", "model.onnx", "int8"),
        (("--model-config-name=fp32",), "model.fp32.onnx", "model.fp32.onnx", "fp32"),
    ],
)
def test_the_server_takes_the_chosen_precisions_and_says_so(
    built: Path,
    checkpoint: Path,
    tmp_path: Path,
    options: tuple[str, ...],
    flow_align: str,
    generator: str,
    precision: str,
) -> None:
    with TritonServer(built / "models", tmp_path / "triton.log", *options) as server:
        log = server.log_file.read_text()
        with InferenceServerClient(server.grpc_url) as client:
            config = client.get_model_config(spec.ENSEMBLE.name).config
    assert f"generator stream_0_0: {generator} on CPUExecutionProvider" in log
    assert f"flow_align stream_0_0: {flow_align} on CPUExecutionProvider" in log
    parameters = {name: value.string_value for name, value in config.parameters.items()}
    assert parameters == {**spec.PARAMETERS, **identity(precision, weights_of(checkpoint))}
