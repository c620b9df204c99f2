"""``make doctor``: check this machine for common serving problems, and print the command that fixes each.

It changes nothing. Sizes follow from the served tensors and the frame size that is to be served.
"""

from __future__ import annotations

import json
import re
import shutil
import socket
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib import metadata, util
from pathlib import Path

import click
import numpy as np
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb
from tritonclient.utils import triton_to_np_dtype

from deploy.embedded.launcher import LaunchError, check_packages, find_libpython, find_wheel
from deploy.finding import Finding
from deploy.servers import check_servers, check_version
from export import spec
from export.errors import ExportError
from export.model_config import plan_file
from export.repository import VERSION, check_onnx
from export.tensorrt.gpus import compute_capabilities
from mst_gan_client.serving.security import Security

ROOT = Path(__file__).parent.parent
REPOSITORY = ROOT / "model_repository"
MB = 2**20
CUDA_POOL, PINNED_POOL = 64 * MB, 256 * MB  # Triton's defaults
PORTS = {"http": 8000, "grpc": 8001, "metrics": 8002}
EMBEDDED = "2.51.0"  # the Triton of nvidia-pytriton 0.7.0


def frame_bytes(tensors: Sequence[spec.TensorSpec], lr_size: spec.Size) -> int:
    """Bytes of one window's tensors."""
    return sum(
        int(np.prod(tensor.shape(1, lr_size))) * np.dtype(triton_to_np_dtype(tensor.dtype)).itemsize
        for tensor in tensors
    )


def in_flight() -> int:
    """Windows whose tensors are in memory at once: a full batch in each instance and one between stages."""
    return spec.MAX_BATCH * (len(spec.INSTANCE_GROUPS) + 1)


def check_shm(lr_size: spec.Size, shm: Path = Path("/dev/shm")) -> Finding:
    """Shared memory of the embedded server: each instance holds a full batch of its inputs and outputs."""
    wanted = (
        sum(frame_bytes((*stage.inputs, *stage.outputs), lr_size) for stage in spec.STAGES)
        * spec.MAX_BATCH
        * len(spec.INSTANCE_GROUPS)
    )
    if not shm.is_dir():
        return Finding("error", "shared memory", f"no {shm}", "mount it: mount -t tmpfs tmpfs /dev/shm")
    free = shutil.disk_usage(shm).free
    text = f"{shm} has {free // MB} MB free, full batches at {_wxh(lr_size)} take at most {wanted // MB} MB"
    gigabytes = -(-wanted // 2**30)
    if free >= wanted:
        return Finding("ok", "shared memory", text)
    return Finding(
        "error", "shared memory", text,
        f"docker run --shm-size={gigabytes}g, or mount -o remount,size={gigabytes}g {shm}",
    )  # fmt: skip


def check_pools(lr_size: spec.Size, gpus: Sequence[str]) -> Iterator[Finding]:
    """Pools of NVIDIA's server for tensors between the stages; the embedded server does not use them."""
    between = {tensor for stage in spec.STAGES for tensor in (*stage.inputs, *stage.outputs)}
    ends = (*spec.ENSEMBLE.inputs, *spec.ENSEMBLE.outputs)
    cuda = frame_bytes(tuple(between), lr_size) * in_flight()
    pinned = frame_bytes(ends, lr_size) * in_flight()
    for name, wanted, default, flag in (
        ("CUDA pool", cuda, CUDA_POOL, "--cuda-memory-pool-byte-size=0:{}"),
        ("pinned pool", pinned, PINNED_POOL, "--pinned-memory-pool-byte-size={}"),
    ):
        text = f"{_wxh(lr_size)} takes {wanted // MB} MB, Triton's default is {default // MB} MB"
        if not gpus:
            yield Finding("ok", name, f"no GPU here; on one, {text}")
        elif wanted <= default:
            yield Finding("ok", name, text)
        else:
            size = -(-wanted // (64 * MB)) * 64 * MB
            yield Finding("warn", name, f"{text}: the rest goes through the host", flag.format(size))


def check_embedded() -> Iterator[Finding]:
    """Version of the embedded server."""
    try:
        find_wheel()
    except LaunchError as err:
        yield Finding("error", "server", str(err), "make setup")
        return
    yield from check_version(EMBEDDED, "the embedded server")


def check_stub() -> Iterator[Finding]:
    """Packages and libraries that the embedded server needs in this Python."""
    try:
        check_packages()
        yield Finding("ok", "numpy", f"{metadata.version('numpy')}, as the Python stub wants (< 2)")
    except LaunchError as err:
        yield Finding("error", "numpy", str(err), "make setup")
    try:
        yield Finding("ok", "libpython", f"in {find_libpython()}")
    except LaunchError as err:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        yield Finding("error", "libpython", str(err), f"apt-get install libpython{version}")


def check_repository(repository: Path = REPOSITORY) -> Iterator[Finding]:
    """Whether a repository is whole, and which precision is served by default."""
    parts = sorted(repository.glob("*/*/*.part")) + sorted(repository.glob("*/*.part"))
    if parts:
        text = f"an export ended before it was done: {', '.join(str(path) for path in parts)}"
        yield Finding("error", "repository", text, "make export")
    ensembles: list[tuple[spec.ModelSpec, Sequence[spec.ModelSpec], str]]
    ensembles = [(spec.ENSEMBLE, spec.STAGES, "make export")]
    if any((repository / one.name).exists() for one in (spec.STREAM_ENSEMBLE, *spec.STREAM_STAGES)):
        ensembles.append((spec.STREAM_ENSEMBLE, spec.STREAM_STAGES, "make stream"))
    for ensemble, stages, command in ensembles:
        folder = repository / ensemble.name
        if not (folder / "config.pbtxt").is_file():
            yield Finding("error", ensemble.name, f"{folder / 'config.pbtxt'} is missing", command)
        elif not (folder / VERSION).is_dir():
            text = f"the folder {folder / VERSION} is missing; Triton wants one even of an ensemble"
            yield Finding(
                "error", ensemble.name, text, "make configs" if ensemble == spec.ENSEMBLE else command
            )
        for stage in stages:
            yield check_stage(repository, stage, command)


def check_stage(repository: Path, stage: spec.ModelSpec, command: str) -> Finding:
    """Whether a composing model is whole; ``command`` makes it."""
    folder = repository / stage.name
    try:
        config = text_format.Parse((folder / "config.pbtxt").read_text(), pb.ModelConfig())
    except (OSError, text_format.ParseError) as err:
        fix = "make configs" if stage in spec.STAGES else command
        return Finding("error", stage.name, f"no readable config.pbtxt: {err}", fix)
    model = folder / VERSION / config.default_model_filename
    if not model.parent.is_dir():
        return Finding("error", stage.name, f"the folder {model.parent} is missing", command)
    if not model.is_file():
        return Finding("error", stage.name, f"{model} is missing", command)
    try:
        check_onnx(model, stage)
    except ExportError as err:
        return Finding("error", stage.name, str(err), command)
    others = {
        path.stem: any((folder / VERSION / name).is_file() for name in _files_of(path))
        for path in sorted((folder / "configs").glob("*.pbtxt"))
    }
    ready = [name for name, there in others.items() if there]
    same = [
        path.name for path in sorted((folder / VERSION).glob("model.*.onnx"))
        if path.stat().st_size == model.stat().st_size and path.read_bytes() == model.read_bytes()
    ]  # fmt: skip
    text = f"serves {model.name}{f' = {same[0]}' if same else ''}"
    return Finding("ok", stage.name, f"{text}; --model-config-name: {', '.join(ready) or 'none built'}")


def check_plans(
    gpus: Sequence[str], repository: Path = REPOSITORY, tensorrt: str | None = None
) -> Iterator[Finding]:
    """Compare installed plans with this machine's GPUs and, where it is installed, its TensorRT.

    Args:
        gpus: Compute capabilities of this machine.
        repository: The model repository.
        tensorrt: Version of TensorRT here; None where there is none, as on the host of a container.
    """
    rebuild = "make export TARGET=tensorrt"
    for stage in spec.STAGES:
        version = repository / stage.name / "1"
        plans = sorted(version.glob("model.sm*.plan"))
        if not plans:
            continue
        here = [plan_file(gpu) for gpu in gpus]
        if gpus and not set(here) & {plan.name for plan in plans}:
            text = (
                f"{stage.name} has {', '.join(p.name for p in plans)}, none for compute capability {gpus[0]}"
            )
            yield Finding("error", "plans", text, rebuild)
        for plan in plans:
            identity = plan.with_name(f"{plan.name}.json")
            try:
                found = json.loads(identity.read_text())
                built_by, built_for = str(found["version"]), list(found["gpus"])
            except (OSError, ValueError, KeyError, TypeError) as err:
                yield Finding("error", "plans", f"{plan}: no readable identity beside it ({err!r})", rebuild)
                continue
            text = f"{stage.name} {plan.name}: TensorRT {built_by}, GPU {', '.join(built_for)}"
            if tensorrt is not None and built_by != tensorrt:
                yield Finding("error", "plans", f"{text}; here is TensorRT {tensorrt}", rebuild)
            elif plan.name not in {plan_file(gpu) for gpu in built_for}:
                yield Finding("error", "plans", f"{text}, which its name does not say", rebuild)
            else:
                where = "" if tensorrt else "; serve it with an image of that version"
                yield Finding("ok", "plans", text + where)


def check_ports() -> Iterator[Finding]:
    """Whether Triton's default ports are free."""
    for name, port in PORTS.items():
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as Triton does
            try:
                listener.bind(("127.0.0.1", port))
                yield Finding("ok", f"{name} port", f"{port} is free")
            except OSError as err:
                text = f"{port} is taken ({err.strerror})"
                yield Finding(
                    "warn", f"{name} port", text, f"make serve SERVE_ARGS=--{name}-port={port + 10}"
                )


def check_cpu(cpuinfo: Path = Path("/proc/cpuinfo")) -> Finding:
    """Whether this CPU has instructions for INT8 (VNNI)."""
    try:
        flags = set(re.findall(r"\S+", next(re.finditer(r"^flags\s*:(.*)$", cpuinfo.read_text(), re.M))[1]))
    except (OSError, StopIteration):
        return Finding(
            "warn", "CPU", f"{cpuinfo} lists no instructions", "make export TARGET=cpu measures it"
        )
    found = [name for name in ("avx512_vnni", "avx_vnni") if name in flags]
    if found:
        return Finding("ok", "CPU", f"{', '.join(found)}: INT8 is multiplied in one instruction")
    return Finding(
        "warn", "CPU", "neither avx512_vnni nor avx_vnni: INT8 gains less",
        "make export measures it and serves FP32 if INT8 is not faster here",
    )  # fmt: skip


def examine(lr_size: spec.Size, urls: Sequence[str], security: Security, metrics_port: int) -> list[Finding]:
    """All checks of this machine, and of running servers; see ``check_servers``."""
    gpus = compute_capabilities()
    tensorrt = metadata.version("tensorrt") if util.find_spec("tensorrt") else None
    return [
        Finding("ok", "GPU", f"compute capability {', '.join(gpus)}" if gpus else "none; the CPU serves"),
        check_cpu(),
        *check_stub(),
        *(check_servers(urls, security, metrics_port) if urls else check_embedded()),
        *([] if urls else check_ports()),  # a running server has them
        *check_repository(),
        *check_plans(gpus, tensorrt=tensorrt),
        check_shm(lr_size),
        *check_pools(lr_size, gpus),
    ]


def table(findings: Sequence[Finding]) -> str:
    """Findings as aligned lines, each fix below its finding."""
    width = max(len(finding.check) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.level:<5}  {finding.check:<{width}}  {finding.text}")
        if finding.fix:
            lines.append(f"{'':<5}  {'':<{width}}  -> {finding.fix}")
    return "\n".join(lines)


def parse_size(_: click.Context, __: click.Parameter, value: str) -> spec.Size:
    """``1280x720``, as FFmpeg writes it, to (height, width)."""
    found = re.fullmatch(r"(\d+)x(\d+)", value)
    if not found or 0 in (size := (int(found[2]), int(found[1]))):
        raise click.BadParameter(f"expected WIDTHxHEIGHT such as 1280x720, found {value!r}")
    height, width = (-(-side // spec.MULTIPLE_OF) * spec.MULTIPLE_OF for side in size)
    return min(height, spec.LR_SIZES[-1][0]), min(width, spec.LR_SIZES[-1][1])  # larger goes in tiles


def _wxh(lr_size: spec.Size) -> str:
    return "{1}x{0}".format(*lr_size)


def _files_of(config: Path) -> list[str]:
    parsed = text_format.Parse(config.read_text(), pb.ModelConfig())
    return [parsed.default_model_filename, *parsed.cc_model_filenames.values()]


@click.command(context_settings={"show_default": True})
@click.option("--size", default="1280x720", callback=parse_size, help="Frames to be sent, WIDTHxHEIGHT.")
@click.option("--url", metavar="A,B,...", help="gRPC addresses of running servers, to check them too.")
@click.option("--metrics-port", default=PORTS["metrics"], help="Of these servers; 0: do not look.")
@click.option(
    "--tls-ca", type=click.Path(path_type=Path), help="Authorities to trust, for grpcs:// addresses."
)
@click.option("--token", envvar="UPSCALE_TOKEN", help="Bearer token; better in UPSCALE_TOKEN than here.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def main(
    size: spec.Size, url: str | None, metrics_port: int, tls_ca: Path | None, token: str | None, as_json: bool
) -> None:
    """Check what serving here needs; exit status 1 if something would fail."""
    urls = url.split(",") if url else []
    findings = examine(size, urls, Security(ca=tls_ca, token=token if urls else None), metrics_port)
    click.echo(json.dumps([asdict(f) for f in findings], indent=2) if as_json else table(findings))
    sys.exit(any(finding.level == "error" for finding in findings))


if __name__ == "__main__":
    main()
