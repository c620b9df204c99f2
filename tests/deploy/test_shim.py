"""The embedded ``onnxruntime`` backend without a server: Triton's API is faked, ONNX Runtime is real."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploy.embedded.launcher import SHIM

Array = np.ndarray[Any, Any]
TABLE_SIZE = 10  # an index at or above it makes the run fail


class Tensor:
    def __init__(self, name: str, array: Array) -> None:
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> Array:
        return self._array


class Request:
    def __init__(self, **arrays: Array) -> None:
        self._tensors = [Tensor(name, array) for name, array in arrays.items()]

    def inputs(self) -> list[Tensor]:
        return self._tensors


class Response:
    def __init__(self, output_tensors: list[Tensor] | None = None, error: Exception | None = None) -> None:
        self.tensors = {tensor.name(): tensor.as_numpy() for tensor in output_tensors or []}
        self.error = error


class Logger:
    lines: list[str] = []  # noqa: RUF012  one log for all, as in Triton

    @classmethod
    def log_info(cls, line: str) -> None:
        cls.lines.append(line)

    log_warn = log_info


@pytest.fixture
def shim(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The backend's module, loaded from its file as Triton loads it."""
    utils = ModuleType("triton_python_backend_utils")
    utils.Tensor, utils.InferenceResponse, utils.Logger = Tensor, Response, Logger  # type: ignore[attr-defined]
    utils.TritonError = type("TritonError", (Exception,), {"INVALID_ARG": 3})  # type: ignore[attr-defined]
    utils.TritonModelException = type("TritonModelException", (Exception,), {})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", utils)
    monkeypatch.syspath_prepend(SHIM.parent)  # as the server's stub does
    monkeypatch.delitem(sys.modules, "sequences", raising=False)
    Logger.lines.clear()
    spec = importlib.util.spec_from_file_location("shim_under_test", SHIM)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """``table[index] + offset`` as a model of a repository; an index outside the table fails the run."""
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["table", "index"], ["picked"]),
            helper.make_node("Add", ["picked", "offset"], ["total"]),
        ],
        "lookup",
        [
            helper.make_tensor_value_info("index", TensorProto.INT64, ["N", "L"]),
            helper.make_tensor_value_info("offset", TensorProto.FLOAT, ["N", "L"]),
        ],
        [
            helper.make_tensor_value_info("picked", TensorProto.FLOAT, ["N", "L"]),
            helper.make_tensor_value_info("total", TensorProto.FLOAT, ["N", "L"]),
        ],
        [numpy_helper.from_array(np.arange(TABLE_SIZE, dtype=np.float32) ** 2, "table")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (tmp_path / "1").mkdir()
    onnx.save(model, tmp_path / "1/lookup.onnx")
    return tmp_path


def config(**changes: Any) -> dict[str, Any]:
    """A configuration as Triton hands it over: complete, as JSON."""
    return {
        "name": "lookup",
        "max_batch_size": 4,
        "default_model_filename": "lookup.onnx",
        "input": [
            {"name": "index", "data_type": "TYPE_INT64", "dims": [-1]},
            {"name": "offset", "data_type": "TYPE_FP32", "dims": [-1]},
        ],
        "output": [{"name": "total", "data_type": "TYPE_FP32", "dims": [-1]}],
        "instance_group": [{"name": "a", "count": 1}, {"name": "b", "count": 1}],
        "parameters": {},
        **changes,
    }


def load(shim: ModuleType, model_folder: Path, *, gpu: bool = True, **changes: Any) -> Any:
    """An initialised instance whose session remembers its runs, and which batches as if on a GPU, or not."""
    model = shim.TritonPythonModel()
    model.initialize(
        {
            "model_config": json.dumps(config(**changes)),
            "model_repository": str(model_folder),
            "model_version": "1",
            "model_instance_name": "a_0",
            "model_instance_kind": "CPU",
            "model_instance_device_id": "0",
        }
    )
    assert model.one_by_one is (config(**changes)["max_batch_size"] > 0)
    model.one_by_one &= not gpu
    model.session = RecordingSession(model.session)
    return model


class RecordingSession:
    def __init__(self, session: Any) -> None:
        self.session, self.feeds = session, list[dict[str, Array]]()

    @property
    def batches(self) -> list[int]:
        return [len(feeds["index"]) for feeds in self.feeds]

    def run(self, names: list[str], feeds: dict[str, Array]) -> list[Array]:
        self.feeds.append(feeds)
        arrays: list[Array] = self.session.run(names, feeds)
        return arrays


def request(*index: int, rows: int = 1) -> Request:
    array = np.tile(np.array([index], np.int64), (rows, 1))
    return Request(index=array, offset=np.full(array.shape, 0.5, np.float32))


def expected(*index: int, rows: int = 1) -> Array:
    return np.tile(np.array([index], np.float32) ** 2 + 0.5, (rows, 1))


def test_sizes_that_the_network_does_not_take_are_refused_alone(shim: ModuleType, model_folder: Path) -> None:
    model = load(shim, model_folder, parameters={"multiple_of": {"string_value": "2"}})

    answers = model.execute([request(1, 2), request(3), request(5, 6), request()])

    assert model.session.batches == [2]
    assert answers[0].error is answers[2].error is None
    for answer, found in ((answers[1], "1"), (answers[3], "0")):
        text, code = answer.error.args
        assert text == (
            f"lookup: expected height and width of index in multiples of 2, found {found}: "
            "pad the frames, repeating their edges, and crop the answer"
        )
        assert code == 3


def test_requests_of_one_shape_share_one_run(shim: ModuleType, model_folder: Path) -> None:
    model = load(shim, model_folder)

    answers = model.execute([request(1, 2), request(3, 4, rows=2), request(5, 6)])

    assert model.session.batches == [4]
    for answer, wanted in zip(answers, [expected(1, 2), expected(3, 4, rows=2), expected(5, 6)], strict=True):
        np.testing.assert_array_equal(answer.tensors["total"], wanted)
    assert answers[0].tensors["total"].base is answers[1].tensors["total"].base  # views of one output
    assert list(answers[0].tensors) == ["total"]  # the configured output alone


def test_a_processor_runs_every_sample_alone(shim: ModuleType, model_folder: Path) -> None:
    model = load(shim, model_folder, gpu=False)

    answers = model.execute([request(1, 2), request(3, 4, rows=2), request(5, TABLE_SIZE)])

    assert model.session.batches == [1, 1, 1, 1]
    np.testing.assert_array_equal(answers[0].tensors["total"], expected(1, 2))
    np.testing.assert_array_equal(answers[1].tensors["total"], expected(3, 4, rows=2))
    assert "out of data bounds" in str(answers[2].error)


def test_one_request_is_run_as_it_came(shim: ModuleType, model_folder: Path) -> None:
    model = load(shim, model_folder)
    only = request(1, 2)

    answers = model.execute([only])

    np.testing.assert_array_equal(answers[0].tensors["total"], expected(1, 2))
    assert all(model.session.feeds[0][tensor.name()] is tensor.as_numpy() for tensor in only.inputs())


def test_other_shapes_get_runs_of_their_own_in_order(shim: ModuleType, model_folder: Path) -> None:
    model = load(shim, model_folder)

    answers = model.execute([request(1, 2), request(3), request(4, 5)])

    assert model.session.batches == [2, 1]
    for answer, wanted in zip(answers, [expected(1, 2), expected(3), expected(4, 5)], strict=True):
        np.testing.assert_array_equal(answer.tensors["total"], wanted)


def test_a_failing_request_does_not_fail_its_batch(shim: ModuleType, model_folder: Path) -> None:
    model = load(shim, model_folder)

    answers = model.execute([request(1, 2), request(3, TABLE_SIZE), request(5, 6)])

    assert model.session.batches == [3, 1, 1, 1]
    np.testing.assert_array_equal(answers[0].tensors["total"], expected(1, 2))
    assert re.search(r"lookup failed on index \[1, 2\].* out of data bounds", str(answers[1].error))
    np.testing.assert_array_equal(answers[2].tensors["total"], expected(5, 6))


def test_a_model_without_batch_axis_never_shares_a_run(shim: ModuleType, model_folder: Path) -> None:
    tensors = {
        "input": [
            {"name": "index", "data_type": "TYPE_INT64", "dims": [-1, -1]},
            {"name": "offset", "data_type": "TYPE_FP32", "dims": [-1, -1]},
        ],
        "output": [{"name": "total", "data_type": "TYPE_FP32", "dims": [-1, -1]}],
    }
    model = load(shim, model_folder, max_batch_size=0, **tensors)

    model.execute([request(1), request(2)])

    assert model.session.batches == [1, 1]


def test_an_output_of_another_batch_is_an_error(shim: ModuleType, model_folder: Path) -> None:
    model = load(shim, model_folder)
    model.session.session = type(
        "Sum", (), {"run": lambda self, names, feeds: [np.zeros((1, 2), np.float32)]}
    )()

    with pytest.raises(ValueError, match="output total has batch 1 after a run of batch 2"):
        model._run([{"index": np.zeros((1, 2))}, {"index": np.zeros((1, 2))}])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"default_model_filename": "other.onnx"}, "other.onnx does not exist: run `make export`"),
        (
            {"input": config()["input"][:1]},
            "config.pbtxt expects inputs .*index.* the ONNX file has .*offset",
        ),
        (
            {"output": [{"name": "sum", "data_type": "TYPE_FP32", "dims": [-1]}]},
            "expects outputs .*sum.*total",
        ),
        ({"output": [{"name": "total", "data_type": "TYPE_FP16", "dims": [-1]}]}, "TYPE_FP16.*TYPE_FP32"),
        (
            {"output": [{"name": "total", "data_type": "TYPE_FP32", "dims": [-1, 3]}]},
            r"\[-1, -1, 3\].*\[-1, -1\]",
        ),
        ({"parameters": {"execution_mode": {"string_value": "2"}}}, "execution_mode is '2'"),
    ],
)
def test_a_config_that_does_not_fit_fails_the_load(
    shim: ModuleType, model_folder: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(shim.pb_utils.TritonModelException, match=message):
        load(shim, model_folder, **changes)


def test_a_broken_file_fails_the_load(shim: ModuleType, model_folder: Path) -> None:
    (model_folder / "1/lookup.onnx").write_bytes(b"no model")

    with pytest.raises(shim.pb_utils.TritonModelException, match=r"lookup.onnx cannot be loaded \(.+\)"):
        load(shim, model_folder)


@pytest.mark.parametrize(("cores", "threads"), [(1, 1), (2, 1), (5, 2), (16, 8)])
def test_instances_share_the_cores(shim: ModuleType, cores: int, threads: int) -> None:
    assert shim.session_options(config(), cores).intra_op_num_threads == threads


def test_the_log_names_instance_provider_and_threads(shim: ModuleType, model_folder: Path) -> None:
    load(shim, model_folder)

    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert f"lookup a_0: lookup.onnx on CPUExecutionProvider, {threads} threads" in Logger.lines


def test_parameters_are_read_as_the_native_backend_does(shim: ModuleType) -> None:
    values = {"intra_op_thread_count": "3", "inter_op_thread_count": "2", "execution_mode": "1"}
    options = shim.session_options(
        config(parameters={name: {"string_value": value} for name, value in values.items()}), cores=16
    )

    assert options.intra_op_num_threads == 3
    assert options.inter_op_num_threads == 2
    assert options.execution_mode == ort.ExecutionMode.ORT_PARALLEL
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"


@pytest.mark.parametrize(
    ("level", "wanted"),
    [
        (None, ort.GraphOptimizationLevel.ORT_ENABLE_ALL),
        (-1, ort.GraphOptimizationLevel.ORT_ENABLE_BASIC),
        (1, ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED),
        (2, ort.GraphOptimizationLevel.ORT_DISABLE_ALL),
    ],
)
def test_graph_level(shim: ModuleType, level: int | None, wanted: ort.GraphOptimizationLevel) -> None:
    changes = {} if level is None else {"optimization": {"graph": {"level": level}}}

    assert shim.session_options(config(**changes), cores=2).graph_optimization_level == wanted


def accelerators(*names: str, **parameters: str) -> dict[str, Any]:
    wanted = [{"name": name, "parameters": parameters} for name in names]
    return {"optimization": {"execution_accelerators": {"gpu_execution_accelerator": wanted}}}


@pytest.mark.parametrize(
    ("kind", "available", "changes", "wanted"),
    [
        ("CPU", ["CUDA"], {}, []),
        ("GPU", ["CUDA"], {}, [("CUDA", {"device_id": "1"})]),
        ("GPU", [], {}, []),
        (
            "GPU",
            ["CUDA", "Tensorrt"],
            accelerators("tensorrt", trt_engine_cache_enable="1"),
            [("Tensorrt", {"trt_engine_cache_enable": "1", "device_id": "1"}), ("CUDA", {"device_id": "1"})],
        ),
        ("GPU", ["CUDA"], accelerators("tensorrt"), [("CUDA", {"device_id": "1"})]),
    ],
)
def test_providers_follow_the_instance_kind(
    shim: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    available: list[str],
    changes: dict[str, Any],
    wanted: list[tuple[str, dict[str, str]]],
) -> None:
    monkeypatch.setattr(
        shim.ort, "get_available_providers", lambda: [f"{n}ExecutionProvider" for n in available]
    )

    providers = shim.execution_providers(config(**changes), kind, "1")

    assert providers == [
        *((f"{name}ExecutionProvider", options) for name, options in wanted),
        "CPUExecutionProvider",
    ]


def test_a_missing_accelerator_is_named_in_the_log(shim: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shim.ort, "get_available_providers", lambda: ["CUDAExecutionProvider"])

    shim.execution_providers(config(**accelerators("tensorrt")), "GPU", "0")

    assert Logger.lines == ["lookup: accelerator tensorrt is not in this ONNX Runtime"]
