"""Sweeps: what they measure, what they run, what they keep, and what stops them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from click.testing import CliRunner
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from perf import clip, plan, results, sweep, tools, variant
from perf.analyze import Measurement
from perf.errors import PerfError
from perf.plan import Sweep
from perf.progress import Progress, total_weight
from perf.tools import Analyzer
from perf.variant import Serving

ANALYZER = Analyzer(Path("/bin/perf_analyzer"), Path("/lib"), "1.2")
MEASURED = Measurement(True, 8.0, (7.0, 8.0, 8.0), {"p50": 1.0, "p90": 2.0, "p95": 3.0, "p99": 4.0}, 10)


def read(text: str, tmp_path: Path, name: str = "one") -> Sweep:
    path = tmp_path / "sweeps.toml"
    path.write_text(text)
    return plan.load_sweep(name, path)


def test_committed_sweeps_are_right() -> None:
    sweeps = [plan.load_sweep(name) for name in plan.sweep_names()]

    assert {"concurrency", "queue_delay", "instances", "transport", "load", "sizes"} <= {
        s.name for s in sweeps
    }
    assert all(list(plan.points(one)) for one in sweeps)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("[one]\nbatches = [1]", "expected a question in sweep one"),
        ("[one]\nquestion = '?'\nbatch = [1]", "found 'batch'"),
        ("[one]\nquestion = '?'\nbatches = 1", "found 1"),
        ("[one]\nquestion = '?'\nbatches = []", "found \\[\\]"),
        ("[one]\nquestion = '?'\nframes = 0", "above zero; found 0"),
        ("[one]\nquestion = '?'\nframes = true", "found True"),
        ("[one]\nquestion = '?'\nsizes = [[1, 2, 3]]", "\\[height, width\\]"),
        ("[one]\nquestion = '?'\ntransports = ['carrier pigeon']", "found 'carrier pigeon'"),
        ("[one]\nquestion = '?'\nforms = ['split']", "among ensemble, fused; found 'split'"),
        ("[one]\nquestion = '?'\nloads = [0.5]\nconcurrencies = [1, 2]", "one concurrency beside loads"),
        ("[two]\nquestion = '?'", "a sweep of sweeps.toml: two; found 'one'"),
        ("[one", "expected sweeps in"),
    ],
)
def test_wrong_sweep(table: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(PerfError, match=message) as caught:
        read(table, tmp_path)
    assert "\n" not in str(caught.value)


def test_points_are_all_combinations_grouped_by_server(tmp_path: Path) -> None:
    axes = "queue_delays_us = [0, 500]\nbatches = [1, 4]\nconcurrencies = [2]\nloads = [0.5]"
    one = read(f"[one]\nquestion = '?'\n{axes}", tmp_path)

    found = [(p.serving.queue_delay_us, p.batch, p.load) for p in plan.points(one)]

    assert found == [(delay, batch, load) for delay in (0, 500) for batch in (1, 4) for load in (None, 0.5)]


def test_unknown_sweep_is_one_line() -> None:
    result = CliRunner().invoke(sweep.main, ["nonsense"])

    assert result.exit_code == 1
    assert result.output.startswith("Error: expected a sweep of sweeps.toml: concurrency, ")
    assert result.output.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["sizes", "--target", "fp32"], [("sizes_fp32", ("fp32",))]),
        (["sizes", "transport_cuda"], [("sizes", ()), ("transport_cuda", ("cuda",))]),
    ],
)
def test_chosen_sweeps(
    arguments: list[str], expected: list[tuple[str, tuple[str, ...]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A target of the command line gives the results a name of their own."""
    assert run_main(arguments, monkeypatch) == expected


def test_without_names_all_sweeps_run_that_need_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [name for name, _ in run_main([], monkeypatch)]

    assert "concurrency" in names
    assert "transport_cuda" not in names


def test_on_a_gpu_its_sweeps_run_too_under_names_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "gpu", lambda: "a GPU")

    names = [one.name for one in sweep.chosen_sweeps((), None, is_running=False)]

    assert {"concurrency_gpu", "transport_cuda_gpu"} <= set(names)


def test_a_running_server_is_left_as_it_is() -> None:
    names = [one.name for one in sweep.chosen_sweeps((), None, is_running=True)]

    assert {"concurrency", "load", "sizes"} <= set(names)
    assert not {"queue_delay", "instances", "fused", "precision"} & set(names)
    with pytest.raises(PerfError, match="leaves a running server as it is, found instances"):
        sweep.chosen_sweeps(("instances",), None, is_running=True)


def test_a_sweep_that_fails_leaves_the_others_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    run: list[str] = []

    def fail_once(self: sweep.Sweeper) -> Path:
        run.append(self.sweep.name)
        if len(run) == 1:
            raise PerfError("the server ended")
        return Path("results.json")

    monkeypatch.setattr(sweep, "find_analyzer", lambda: ANALYZER)
    monkeypatch.setattr(sweep.Sweeper, "__init__", lambda self, one, *_: setattr(self, "sweep", one))
    monkeypatch.setattr(sweep.Sweeper, "run", fail_once)

    result = CliRunner().invoke(sweep.main, ["sizes", "load"])

    assert run == ["sizes", "load"]
    assert result.exit_code == 1
    assert "Error: the server ended\n" in result.output
    assert "Error: 1 of 2 sweeps did not end: sizes; see above\n" in result.output


def test_progress_estimates_the_rest() -> None:
    now = Progress(total=400.0)
    now.started_s -= 60

    assert now.step(100.0) == "25% done, 1.0 min gone, 3.0 min left"


def run_main(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[str, ...]]]:
    """Names and targets of the sweeps that the command would run."""
    run: list[Sweep] = []
    monkeypatch.setattr(sweep, "find_analyzer", lambda: ANALYZER)
    monkeypatch.setattr(sweep, "gpu", lambda: None)
    monkeypatch.setattr(sweep.Sweeper, "__init__", lambda self, one, *_: run.append(one))
    monkeypatch.setattr(sweep.Sweeper, "run", lambda self: Path("results.json"))
    assert CliRunner().invoke(sweep.main, arguments).exit_code == 0
    return [(one.name, one.targets) for one in run]


def metrics(requests: int) -> str:
    lines = ["# TYPE nv_inference_count counter"]
    for name, value in (
        ("request_success", requests), ("count", 2 * requests), ("exec_count", requests / 2),
        ("queue_duration_us", 5000 * requests), ("compute_input_duration_us", 1000 * requests),
        ("compute_infer_duration_us", 20000 * requests), ("compute_output_duration_us", 500 * requests),
    ):  # fmt: skip
        lines.append(f'nv_inference_{name}{{model="generator",version="1"}} {value}')
    lines.append('nv_inference_request_failure{model="generator",reason="OTHER",version="1"} 0')
    return "\n".join(lines)


def test_variant_changes_the_stages_of_a_copy(toy_repository: Path, tmp_path: Path) -> None:
    committed = (toy_repository / "generator/config.pbtxt").read_text()

    variant.write_variant(toy_repository, tmp_path, Serving(queue_delay_us=7, instances=1))

    for name in ("flow_align", "generator", "pixel_shuffle"):
        config = text_format.Parse((tmp_path / name / "config.pbtxt").read_text(), pb.ModelConfig())
        assert config.dynamic_batching.max_queue_delay_microseconds == 7
        assert len(config.instance_group) == 1
        assert (tmp_path / name / "1/model.onnx").samefile(toy_repository / name / "1/model.onnx")
    assert (tmp_path / "mst_gan/config.pbtxt").is_file()
    assert (toy_repository / "generator/config.pbtxt").read_text() == committed


def test_variant_takes_the_targets_configuration(toy_repository: Path, tmp_path: Path) -> None:
    repository, out = tmp_path / "repository", tmp_path / "out"
    repository.mkdir()
    out.mkdir()
    variant.write_variant(toy_repository, repository, Serving())
    (repository / "generator/configs").mkdir()
    (repository / "generator/configs/cuda.pbtxt").write_text(
        (repository / "generator/config.pbtxt").read_text().replace("max_batch_size: 4", "max_batch_size: 2")
    )

    variant.write_variant(repository, out, Serving(target="cuda"))

    assert "max_batch_size: 2" in (out / "generator/config.pbtxt").read_text()
    assert "max_batch_size: 4" in (out / "flow_align/config.pbtxt").read_text()


def test_fused_graph_answers_as_its_stages_do(toy_repository: Path, tmp_path: Path) -> None:
    variant.write_variant(toy_repository, tmp_path, Serving(form="fused"))
    window = np.random.default_rng(0).integers(0, 256, (2, 3, 16, 20, 3), dtype=np.uint8)

    def run(path: Path, feeds: dict[str, Any]) -> dict[str, Any]:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        inputs = {node.name: feeds[node.name] for node in session.get_inputs()}
        return dict(zip(names, session.run(names, inputs), strict=True))

    tensors: dict[str, Any] = {"lr_window": window}
    for name in ("flow_align", "generator", "pixel_shuffle"):
        tensors |= run(toy_repository / name / "1/model.onnx", tensors)
    fused = run(tmp_path / "fused/1/model.onnx", {"lr_window": window})

    assert sorted(path.name for path in tmp_path.iterdir()) == ["fused"]
    assert list(fused) == ["hr_frame"]
    np.testing.assert_array_equal(fused["hr_frame"], tensors["hr_frame"])


def test_frames_are_real_and_windows_repeat_their_edges(tmp_path: Path) -> None:
    frames = clip.read_frames(3, (20, 36))
    windows = clip.windows(frames, 3)
    clip.write_input_data(tmp_path / "in.json", "lr_window", windows)

    assert windows.shape == (3, 3, 20, 36, 3)
    assert frames.std() > 10  # a picture, not grey
    np.testing.assert_array_equal(windows[0], frames[[0, 0, 1]])
    np.testing.assert_array_equal(windows[2], frames[[1, 2, 2]])
    data = json.loads((tmp_path / "in.json").read_text())["data"]
    assert [one["lr_window"]["shape"] for one in data] == [[3, 20, 36, 3]] * 3


@pytest.mark.parametrize(("size", "served"), [((270, 480), (272, 480)), ((180, 321), (180, 324))])
def test_sizes_are_padded_as_clients_do(size: tuple[int, int], served: tuple[int, int]) -> None:
    assert clip.padded(size, 4) == served


class FakeServer:
    """Answers with metrics; dies when told."""

    grpc_url = "localhost:1"

    def __init__(self) -> None:
        self.process = self
        self.pid, self.returncode = os.getpid(), None
        self.requests = 0

    def poll(self) -> int | None:
        return self.returncode

    def metrics(self) -> str:
        self.requests += 10
        return metrics(self.requests)

    def ready(self) -> bool:
        return self.returncode is None

    def log_tail(self) -> str:
        return "last words"


@pytest.fixture
def sweeper(
    toy_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[sweep.Sweeper, FakeServer, list[float | None]]]:
    """A sweep of five points on a server that is not there; and the rates that were asked for."""
    server, rates = FakeServer(), []

    def measure(*arguments: Any) -> Measurement:
        rates.append(arguments[4])
        if len(rates) == 6:
            server.returncode = -9
            raise PerfError("connection lost")
        return MEASURED

    @contextmanager
    def serve(self: sweep.Sweeper, serving: Serving) -> Iterator[FakeServer]:
        yield server

    monkeypatch.setattr(sweep, "measure", measure)
    monkeypatch.setattr(sweep, "warm_up", lambda *_: None)
    monkeypatch.setattr(sweep, "ROOT", tmp_path)
    monkeypatch.setattr(sweep.Sweeper, "serve", serve)
    one = Sweep("one", "?", sizes=((16, 16),), batches=(4,), loads=(0.25, 0.5), instances=(1, 2))
    bench = sweep.Bench(ANALYZER, toy_repository, tmp_path / "out", tmp_path)
    yield sweep.Sweeper(one, bench, Progress(total_weight([one]))), server, rates


def test_dead_server_stops_the_sweep_and_keeps_its_points(
    sweeper: tuple[sweep.Sweeper, FakeServer, list[float | None]], tmp_path: Path
) -> None:
    with pytest.raises(
        PerfError, match=r"sweep one stopped: tritonserver no longer answers \(exit status -9\): last words"
    ):
        sweeper[0].run()

    result = results.load(tmp_path / "out/one.json")
    assert result["stopped"].startswith("tritonserver no longer answers")
    assert len(result["points"]) == 5
    assert result["points"][0]["rounds"][0]["stages"]["generator"]["batch"] == 4.0


def test_open_loop_rates_are_shares_of_the_closed_loops(
    sweeper: tuple[sweep.Sweeper, FakeServer, list[float | None]], tmp_path: Path
) -> None:
    with pytest.raises(PerfError):
        sweeper[0].run()

    assert sweeper[2][:3] == [None, 0.5, 1.0]  # 8 frames/s are 2 requests/s of 4
    first = results.load(tmp_path / "out/one.json")["points"][1]
    assert "--request-rate-range=0.5" in first["command"]
    assert "-u localhost:8001" in first["command"]
    assert str(tmp_path) not in first["command"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected .* to hold results"),
        ("[]", "found None"),
        ('{"schema": "mst-gan-perf/0"}', "found 'mst-gan-perf/0'"),
        ('{"schema": "mst-gan-perf/1", "kind": "sweep"}', "to say kind, name, machine"),
        ('{"schema": "mst-gan-perf/1", "kind": "x", "name": "x", "machine": {}}', "to say kind"),
    ],
)
def test_foreign_results_are_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(PerfError, match=message) as caught:
        results.load_folder(tmp_path)
    assert "\n" not in str(caught.value)


def test_empty_folder_of_results(tmp_path: Path) -> None:
    with pytest.raises(PerfError, match="found none: run `make sweep` first"):
        results.load_folder(tmp_path)


@pytest.mark.server
def test_real_perf_analyzer_on_a_real_server(toy_repository: Path, tmp_path: Path) -> None:
    try:
        analyzer = tools.find_analyzer()
    except PerfError as err:
        if os.environ.get("REQUIRE_PERF"):
            raise
        pytest.skip(str(err))
    one = Sweep("one", "?", sizes=((30, 40),), transports=("grpc", "system"), frames=4)

    sweep.WORK.mkdir(parents=True, exist_ok=True)
    bench = sweep.Bench(analyzer, toy_repository, tmp_path, sweep.WORK)
    path = sweep.Sweeper(one, bench, Progress(total_weight([one]))).run()

    result = results.load(path)
    assert result["stopped"] == ""
    assert [point["transport"] for point in result["points"]] == ["grpc", "system"]
    for point in result["points"]:
        (found,) = point["rounds"]
        assert found["fps"] > 1
        assert found["latency_ms"]["p50"] <= found["latency_ms"]["p99"]
        assert found["stages"]["generator"]["infer_ms"] > 0
        assert found["server_memory_mb"] > 50
