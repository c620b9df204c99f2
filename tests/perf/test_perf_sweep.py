"""Sweeps: what they measure, what they serve, what they keep, and what stops them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from google.protobuf import text_format
from rich.progress import Progress
from test_perf_analyzer import metrics
from tritonclient.grpc import model_config_pb2 as pb

from perf import clips, serving, sweep
from perf.results import PerfError, load_folder
from perf.serving import Repository, Serving
from perf.sweep import Sweep


def test_committed_sweeps_are_right() -> None:
    sweeps = sweep.load_sweeps()

    assert {"throughput", "streams", "concurrency", "queue_delay", "instances", "transport"} <= {*sweeps}
    assert all(one.points for one in sweeps.values())
    streams = sweeps["streams"]
    assert (streams.arrivals, bool(streams.budget_ms)) == ("constant", True)
    assert {"pruned", "student"} == {*streams.weights}  # the default and the fast one
    for one in (sweeps["throughput"], streams):
        assert one.rounds >= 3
        assert 3 * one.frames >= 100  # enough for a p95


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("[one]\nbatches = [1]", "question"),
        ("[one]\nquestion = '?'\nbatch = [1]", "batch in sweeps.toml"),
        ("[one]\nquestion = '?'\nbatches = []", r"batches .*found \(?\[?\]?"),
        ("[one]\nquestion = '?'\nframes = 0", "found 0"),
        ("[one]\nquestion = '?'\nsizes = [[1, 2, 3]]", r"sizes\.0"),
        ("[one]\nquestion = '?'\ntransports = ['pigeon']", "found 'pigeon'"),
        ("[one]\nquestion = '?'\narrivals = 'odd'", "found 'odd'"),
        ("[one", "expected sweeps in"),
    ],
)
def test_wrong_sweep(table: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "sweeps.toml").write_text(table)
    with pytest.raises(PerfError, match=message) as caught:
        sweep.load_sweeps(tmp_path / "sweeps.toml")
    assert "\n" not in str(caught.value)


def test_points_are_all_combinations_grouped_by_server() -> None:
    one = Sweep(name="one", question="?", queue_delays_us=(0, 500), batches=(1, 4), rates_fps=(24, 48))

    found = [(point.serving.queue_delay_us, point.batch, point.rate_fps) for point in one.points]

    assert found == [(delay, batch, rate) for delay in (0, 500) for batch in (1, 4) for rate in (24, 48)]


def test_sweeps_that_this_machine_and_server_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "gpu", lambda: None)
    names = [one.name for one in sweep.chosen((), is_running=False, quick=False)]
    assert "concurrency" in names
    assert "transport_cuda" not in names
    running = [one.name for one in sweep.chosen((), is_running=True, quick=False)]
    assert "concurrency" in running
    assert not {"queue_delay", "instances", "throughput"} & {*running}
    with pytest.raises(PerfError, match="leave a running server as it is, found instances"):
        sweep.chosen(("instances",), is_running=True, quick=False)
    monkeypatch.setattr(sweep, "gpu", lambda: "a GPU")
    with_gpu = [one.name for one in sweep.chosen((), is_running=False, quick=False)]
    assert {"concurrency_gpu", "transport_cuda_gpu"} <= {*with_gpu}  # a CPU's results stay


def test_unknown_sweep_is_one_line() -> None:
    result = CliRunner().invoke(sweep.main, ["nonsense"])

    assert result.exit_code == 1
    assert result.output.startswith("Error: expected sweeps among throughput, ")
    assert result.output.count("\n") == 1


def test_a_variant_changes_the_stages_of_a_copy(toy_repository: Path, tmp_path: Path) -> None:
    committed = (toy_repository / "generator/config.pbtxt").read_text()

    settings = Serving(queue_delay_us=7, instances=1)
    serving.write_variant(Repository(toy_repository), tmp_path, settings)

    for name in ("flow_align", "generator", "pixel_shuffle"):
        config = text_format.Parse((tmp_path / name / "config.pbtxt").read_text(), pb.ModelConfig())
        assert config.dynamic_batching.max_queue_delay_microseconds == 7
        assert sum(group.count for group in config.instance_group) == 1
        assert (tmp_path / name / "1/model.onnx").samefile(toy_repository / name / "1/model.onnx")
    assert (tmp_path / "mst_gan/config.pbtxt").is_file()
    assert (toy_repository / "generator/config.pbtxt").read_text() == committed


def test_a_target_has_its_own_configurations(toy_repository: Path, tmp_path: Path) -> None:
    serving.write_variant(Repository(toy_repository), tmp_path, Serving(batching=False))
    (tmp_path / "generator/configs").mkdir()
    text = (tmp_path / "generator/config.pbtxt").read_text()
    assert "dynamic_batching" not in text
    (tmp_path / "generator/configs/cuda.pbtxt").write_text(
        text.replace("max_batch_size: 4", "max_batch_size: 2")
    )

    found = Repository(tmp_path, "cuda")

    assert (found.committed["max_batch_size"], found.configs["flow_align"].max_batch_size) == (2, 4)
    with pytest.raises(PerfError, match=r"expected mst_gan/config\.pbtxt"):
        Repository(tmp_path / "generator")


def test_a_model_that_is_not_built_and_weights_that_are_missing(toy_repository: Path, tmp_path: Path) -> None:
    found = Repository(toy_repository)
    found.configs["generator"].default_model_filename = "model.plan"
    with pytest.raises(
        PerfError, match=r"model\.plan, found no such file: run `make export` for this target"
    ):
        found.files()
    with pytest.raises(PerfError, match=r"mst_gan_huge\.safetensors, found none"):
        serving.checkpoint("huge", tmp_path)


def test_requests_carry_real_frames_whose_ends_repeat(tmp_path: Path) -> None:
    frames = clips.read_frames(3, clips.padded((18, 33), 4))
    windows = clips.windows(frames, 3)
    clips.write_input_data(tmp_path / "in.json", "lr_window", windows)

    assert windows.shape == (3, 3, 20, 36, 3)
    assert frames.std() > 10  # a picture, not gray
    np.testing.assert_array_equal(windows[0], frames[[0, 0, 1]])
    np.testing.assert_array_equal(windows[2], frames[[1, 2, 2]])
    data = json.loads((tmp_path / "in.json").read_text())["data"]
    assert [one["lr_window"]["shape"] for one in data] == [[3, 20, 36, 3]] * 3


def test_a_server_that_ends_stops_the_sweep_which_keeps_its_rounds(
    toy_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests, rounds = 0, 0

    def more_metrics() -> str:
        nonlocal requests
        requests += 10
        return metrics(requests)

    def measure(load: Any) -> dict[str, Any]:
        nonlocal rounds
        rounds += 1
        if rounds == 4:
            raise PerfError("connection lost")
        return {"fps": 8.0, "p95_ms": 3.0, "requests": 10}

    @contextmanager
    def serve(source: Repository, settings: Serving) -> Iterator[Any]:
        yield SimpleNamespace(grpc_url="localhost:1", metrics=more_metrics), None

    monkeypatch.setattr(sweep, "serve", serve)
    analyzer: Any = SimpleNamespace(version="1", warm_up=lambda load: None, measure=measure)
    one = Sweep(name="one", question="?", sizes=((16, 16),), instances=(1, 2), rounds=3)

    with pytest.raises(PerfError, match="sweep one stopped: connection lost"):
        sweep.Runner(analyzer, toy_repository, tmp_path, Progress()).run(one)

    result = load_folder(tmp_path)["one"]
    assert result["stopped"] == "connection lost"
    first, second = result["rows"]
    assert (len(first["rounds"]), len(second["rounds"])) == (2, 1)  # in turns
    assert first["rounds"][0]["stages"]["generator"]["batch"] == 4.0
    assert "-u localhost:8001" in first["command"]
    assert "--input-data=build/perf/windows_16x16.json" in first["command"]
