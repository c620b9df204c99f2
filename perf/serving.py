"""What every benchmark serves: the model repository under other settings, in a copy."""

from __future__ import annotations

import hashlib
import logging
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from deploy.embedded.server import ServerError, TritonServer
from perf import clips
from perf.analyzer import Load
from perf.clips import Size
from perf.machine import ROOT, Watch
from perf.results import PerfError, one_line

MODELS = ROOT / "model_repository"
CHECKPOINTS = ROOT / "export" / "checkpoints"
WORK = ROOT / "build" / "perf"  # kept, so that a command pasted later finds its frames
ENSEMBLES = {"mst_gan": "generator", "mst_gan_stream": "stream_generator"}  # the first that is there
STREAM = "stream"  # weights of the second
VERSION = "1"
GPU_TARGETS = {"cuda", "tensorrt"}
REQUESTS = 8  # different windows of one input file, sent in turns
SEQUENCE = 48  # frames of the one sequence of an input file; as many run at once as requests are in flight

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Serving:
    """How the models are served; None leaves a setting as it is in the repository."""

    weights: str | None = None  # of export/checkpoints/mst_gan_<weights>.safetensors, exported first
    target: str | None = None  # of <model>/configs/<target>.pbtxt; models without that file keep their own
    queue_delay_us: int | None = None
    instances: int | None = None  # groups of each stage
    batching: bool = True  # False: every request runs alone


class Repository:
    """A model repository as one target has it, and what its ensemble publishes."""

    def __init__(self, path: Path, target: str | None = None) -> None:
        """Read the configurations. PerfError: There is no ensemble."""
        self.path, self.configs = path, dict[str, pb.ModelConfig]()
        for model in sorted(one.parent for one in path.glob("*/config.pbtxt")):
            chosen = model / "configs" / f"{target}.pbtxt"
            text = (chosen if target and chosen.is_file() else model / "config.pbtxt").read_text()
            self.configs[model.name] = text_format.Parse(text, pb.ModelConfig())
        self.model = next(filter(self.configs.__contains__, ENSEMBLES), None) or ""
        if not self.model:
            raise PerfError(f"expected mst_gan/config.pbtxt in {path}, found none: run `make export`")
        ensemble, generator = self.configs[self.model], self.configs[ENSEMBLES[self.model]]
        self.is_recurrent = generator.HasField("sequence_batching")
        self.steps = ensemble.ensemble_scheduling.step
        self.input_name, self.output_name = ensemble.input[0].name, ensemble.output[0].name
        published = {key: value.string_value for key, value in ensemble.parameters.items()}
        numbers = {key: int(published.get(key, 1)) for key in ("window", "scale", "multiple_of")}
        self.window, self.scale, self.multiple_of = numbers.values()
        self.committed = {
            "queue_delay_us": generator.dynamic_batching.max_queue_delay_microseconds,
            "instances": sum(group.count for group in generator.instance_group),
            "max_batch_size": generator.max_batch_size,
        }

    def files(self) -> dict[str, Path]:
        """Stage -> its file; of plans for several GPUs, the first that is there. PerfError: there is none."""
        found = {}
        for config in (self.configs[step.model_name] for step in self.steps):
            names = [config.default_model_filename or "model.onnx", *config.cc_model_filenames.values()]
            paths = [self.path / config.name / VERSION / name for name in names]
            there = [path for path in paths if path.is_file()]
            if not there:
                raise PerfError(f"expected {paths[0]}, found no such file: run `make export` for this target")
            found[config.name] = there[0]
        return found

    def fingerprints(self) -> dict[str, str]:
        """Stage -> file name and hash of what is served, so that results name their model."""
        digests = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in self.files().items()}
        return {name: f"{path.name}, sha256 {digests[name][:12]}" for name, path in self.files().items()}

    def load(self, url: str, size: Size) -> Load:
        """Requests of one size, (height, width), with real frames from a file that is written once."""
        height, width = clips.padded(size, self.multiple_of)
        path = WORK / f"{'sequence' if self.is_recurrent else 'windows'}_{height}x{width}.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            frames = clips.read_frames(SEQUENCE if self.is_recurrent else REQUESTS, (height, width))
            inputs = frames if self.is_recurrent else clips.windows(frames, self.window)
            clips.write_input_data(path, self.input_name, inputs, in_sequence=self.is_recurrent)
        answer = height * width * self.scale**2 * 3  # RGB bytes
        return Load(url, self.model, path, answer)


def checkpoint(weights: str, folder: Path = CHECKPOINTS) -> Path:
    """The committed checkpoint of this name. PerfError: There is none."""
    path = folder / f"mst_gan_{weights}.safetensors"
    if not path.is_file():
        raise PerfError(f"expected weights at {path}, found none: name one of {folder}")
    return path


def repository_of(serving: Serving, path: Path = MODELS) -> Repository:
    """The repository to serve from: with weights of their own, one that is exported now."""
    if serving.weights is not None:
        path = _exported(serving.weights, serving.target or "cpu")
    return Repository(path, serving.target)


@cache
def _exported(weights: str, target: str) -> Path:
    folder = WORK / f"{weights}-{target}"
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "export", "build-stream" if weights == STREAM else "build"]
    command += ["--repository", str(folder / "models"), "--build", str(folder / "onnx"), "--target", target]
    if weights != STREAM:
        # Without the speed gate, which would leave a slower precision out: how fast it is, is the question.
        command += ["--checkpoint", str(checkpoint(weights)), "--no-speed-gate"]
    log.info("%s > %s", shlex.join(command), folder / "export.log")
    with (folder / "export.log").open("w") as output:
        run = subprocess.run(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
    if run.returncode:
        lines = (folder / "export.log").read_text().splitlines() or ["it gave no reason"]
        raise PerfError(f"the export ended with status {run.returncode}: {lines[-1].removeprefix('Error: ')}")
    return folder / "models"


def write_variant(source: Repository, folder: Path, serving: Serving) -> None:
    """Fill ``folder`` with the repository under these settings; model files are links."""
    stages = source.files()  # all are there
    for name, config in source.configs.items():
        if name in stages:
            if serving.queue_delay_us is not None:
                config.dynamic_batching.max_queue_delay_microseconds = serving.queue_delay_us
            if serving.instances is not None:
                group = pb.ModelInstanceGroup()
                group.CopyFrom(config.instance_group[0])
                del config.instance_group[:]
                for index in range(serving.instances):
                    group.name = f"stream_{index}"
                    config.instance_group.append(group)
            if not serving.batching:
                config.ClearField("dynamic_batching")
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "config.pbtxt").write_text(text_format.MessageToString(config))
        (folder / name / VERSION).symlink_to((source.path / name / VERSION).resolve())


@contextmanager
def serve(source: Repository, serving: Serving) -> Iterator[tuple[TritonServer, Watch]]:
    """The embedded server and a watch on its processes. PerfError: it does not start, or ends under load."""
    WORK.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=WORK) as folder:
        models = Path(folder) / "models"
        models.mkdir()
        write_variant(source, models, serving)
        server = TritonServer(models, Path(folder) / "triton.log")
        try:
            server.start()
            with Watch(server.process.pid) as watch, server:
                try:
                    yield server, watch
                except PerfError as err:
                    status, last = server.process.poll(), server.log_tail().rpartition("\n")[2]
                    raise (
                        err if status is None else PerfError(f"tritonserver ended ({status}): {last}")
                    ) from err
        except ServerError as err:
            raise PerfError(one_line(err)) from err


@dataclass(frozen=True)
class RunningServer:
    """A server that somebody else started, in NVIDIA's container say: measured as it is."""

    grpc_url: str
    metrics_url: str

    def metrics(self) -> str:
        """All metrics as Prometheus text. PerfError: Nobody answers there."""
        try:
            return TritonServer.get(self.metrics_url, "/metrics").read().decode()
        except OSError as err:
            raise PerfError(
                f"expected Triton's metrics at {self.metrics_url}, found: {err}; or pass --metrics-url"
            ) from err
