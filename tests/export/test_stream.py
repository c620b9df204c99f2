"""The recurrent network: its work, its start, its stability over many frames, its export."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from google.protobuf import text_format
from torch import Tensor
from tritonclient.grpc import model_config_pb2 as pb

from export import spec
from export.__main__ import main
from export.checkpoint import load_checkpoint, load_stream_checkpoint, save_checkpoint
from export.data import sample
from export.errors import ExportError
from export.model_config import FP32, INT8
from export.network import STUDENT, MstGan, Widths, stream
from export.network.frames import to_uint8
from export.network.layers import BicubicSubpixels, PixelShuffle
from export.network.stream import (
    MAX_GATE,
    STREAM,
    STREAM_WIDTHS,
    StreamNetwork,
    StreamWidths,
    count_stream,
    from_window_network,
)
from export.onnx.stream import StreamRunner
from export.repository import parent_digest, sha256, stage_path, write_configs
from export.verify import sequences
from export.verify.compare import Report, psnr_db

CHECKPOINTS = Path(__file__).parents[2] / "export" / "checkpoints"
UNFINISHED = CHECKPOINTS / "unfinished" / "stream.safetensors"
KNOWN_OPERATORS = {
    "Abs", "Add", "AveragePool", "Cast", "Clip", "Concat", "Conv", "DepthToSpace", "Div", "Expand",
    "Floor", "Gather", "Greater", "GridSample", "Identity", "Max", "Min", "Mul", "Neg", "Pad",
    "Range", "ReduceMean", "Relu", "Reshape", "Resize", "Round", "Shape", "Sigmoid", "Slice",
    "SpaceToDepth", "Split", "Squeeze", "Sub", "Transpose", "Unsqueeze", "Where",
}  # fmt: skip
"""TensorRT has all of them."""
BICUBIC = BicubicSubpixels(3, spec.SCALE)
TINY_STREAM = StreamWidths(name="tiny_stream", body=16, inner=(8,), features=16)


def shaken(widths: StreamWidths = TINY_STREAM, std: float = 0.05) -> StreamNetwork:
    """No path is silent."""
    torch.manual_seed(1)
    network = StreamNetwork(widths)
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.normal_(std=std)
    return network.eval()


def moving_scene(frames: int, size: tuple[int, int] = (32, 48), seed: int = 0) -> Tensor:
    """(T, H, W, 3) uint8: smooth noise that moves by a pixel and a half per frame."""
    height, width = size
    noise = torch.Generator().manual_seed(seed)
    image = torch.rand(1, 3, height // 4, width // 4 + frames, generator=noise)
    image = torch.nn.functional.interpolate(image, scale_factor=8.0, mode="bicubic").clamp(0, 1)
    rows = [image[0, :, :height, 3 * t : 3 * t + 2 * width : 2] for t in range(frames)]
    return (torch.stack(rows) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def run(network: StreamNetwork, frames: Tensor, resets: tuple[int, ...] = ()) -> list[Tensor]:
    answers, (previous, state) = [], network.first_state(1)
    with torch.inference_mode():
        for t, frame in enumerate(frames):
            start = torch.full((1, 1), float(t == 0 or t in resets))
            hr, previous, state = network(frame[None], previous, state, start)
            answers.append(hr[0])
    return answers


def bicubic(frames: Tensor) -> Tensor:
    """(N, H, W, 3) uint8 -> (N, 4H, 4W, 3) uint8."""
    return PixelShuffle()(to_uint8(BICUBIC(frames.permute(0, 3, 1, 2).float() / 255)))


def test_work_is_within_the_students() -> None:
    parameters, flops = count_stream(STREAM, (180, 320))
    assert flops <= 9.5e9
    assert flops >= 9.4e9  # the table uses what it may
    assert parameters < 82_000


def test_untrained_it_is_bicubic_whatever_the_gate() -> None:
    torch.manual_seed(0)
    frames = moving_scene(3)
    answers = run(StreamNetwork(TINY_STREAM), frames)
    assert torch.equal(answers[0], bicubic(frames[:1])[0])
    # Rounded answers are fed back: their detail over bicubic is not quite zero.
    for answer, expected in zip(answers, bicubic(frames), strict=True):
        assert (answer.int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("inner", [STUDENT.body_inner, (32, 32, 16)])
def test_first_frame_is_the_window_networks(inner: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    window = MstGan(Widths(name="x", body=32, body_inner=(32, 32, 32)))
    with torch.no_grad():
        for parameter in window.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    network = from_window_network(window.generator, StreamWidths(name="y", inner=inner))
    frames = moving_scene(1)
    with torch.inference_mode():
        expected = window(frames[None].expand(-1, 3, -1, -1, -1))[0]
    difference = (run(network, frames)[0].int() - expected.int()).abs()
    if inner == STUDENT.body_inner:
        assert difference.max() <= 1  # sums in another order
        assert (difference > 0).float().mean() < 0.01
    else:
        assert difference.max() > 1


def test_content_and_size_of_the_state_at_a_start_do_not_matter() -> None:
    network, frames = shaken(), moving_scene(1)
    starts = torch.ones(1, 1)
    outputs = []
    for size in ((1, 1), (32, 48)):
        for value in (0, 77, 255):
            previous = torch.full((1, *size, 3), value, dtype=torch.uint8)
            state = torch.full((1, TINY_STREAM.state, *size), value, dtype=torch.uint8)
            with torch.inference_mode():
                outputs.append(network(frames[:1], previous, state, starts))
    for output in outputs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(output, outputs[0], strict=True))


def test_a_reset_forgets() -> None:
    network, frames = shaken(), moving_scene(6)
    whole, fresh = run(network, frames, resets=(3,)), run(network, frames[3:])
    assert all(torch.equal(a, b) for a, b in zip(whole[3:], fresh, strict=True))
    assert not torch.equal(whole[4], run(network, frames)[4])


def test_state_matters_from_the_second_frame_on() -> None:
    network, frames = shaken(), moving_scene(4)
    other = torch.cat((255 - frames[:1], frames[1:]))
    mine, theirs = run(network, frames), run(network, other)
    assert not torch.equal(mine[1], theirs[1])


def test_a_batch_mixes_starting_and_running_sequences() -> None:
    network = shaken()
    scenes = [moving_scene(4, seed=seed) for seed in (0, 1)]
    alone = [run(network, scenes[0], resets=(2,)), run(network, scenes[1])]
    previous = torch.zeros(2, 32, 48, 3, dtype=torch.uint8)
    state = torch.zeros(2, TINY_STREAM.state, 32, 48, dtype=torch.uint8)
    for t in range(4):
        start = torch.tensor([[float(t in (0, 2))], [float(t == 0)]])
        with torch.inference_mode():
            frames = torch.stack([scene[t] for scene in scenes])
            hr, previous, state = network(frames, previous, state, start)
        for index in (0, 1):
            assert (hr[index].int() - alone[index][t].int()).abs().max() <= 1


@pytest.mark.parametrize("size", [(32, 48), (20, 36), (4, 4)])
def test_training_computes_what_is_served(size: tuple[int, int]) -> None:
    network, frames = shaken(), moving_scene(6, (64, 96))[:, : size[0], : size[1]]
    served = run(network, frames)
    generator, images = network.stream_generator, frames.permute(0, 3, 1, 2).float() / 255
    state = generator.start(1, images)
    with torch.no_grad():
        for t, expected in enumerate(served):
            aligned = network.stream_align.align(images[t : t + 1], images[max(0, t - 1)][None])
            answer, state = generator.step(aligned, state, torch.full((1, 1), float(t == 0)))
            hr = network.pixel_shuffle(to_uint8(answer))[0]
            difference = (hr.int() - expected.int()).abs()
            assert difference.max() <= 2
            assert (difference > 0).float().mean() < 0.01


def hard_scenes(frames: int) -> Tensor:
    """(T, 3, 16, 16, 3) uint8: noise that never repeats, a still, and the still with a flash now and then."""
    noise = torch.Generator().manual_seed(0)
    moving = torch.randint(0, 256, (frames, 16, 16, 3), dtype=torch.uint8, generator=noise)
    still = moving[:1].expand(frames, -1, -1, -1)
    bright = torch.arange(frames).view(-1, 1, 1, 1) % 50 == 49
    return torch.stack((moving, still, torch.where(bright, 255, still // 2)), dim=1)


def distances(network: StreamNetwork, scenes: Tensor) -> Tensor:
    """(T, N): mean difference of the answers from bicubic, gray levels."""
    previous, state = network.first_state(scenes.shape[1])
    start, rows = torch.ones(scenes.shape[1], 1), []
    with torch.inference_mode():
        for frames in scenes:
            hr, previous, state = network(frames, previous, state, start)
            start = torch.zeros_like(start)
            rows.append((hr.int() - bicubic(frames).int()).abs().float().mean(dim=(1, 2, 3)))
    return torch.stack(rows)


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["tiny", "trained"])
def test_600_frames_without_drift(weights: str) -> None:
    network = load_stream_checkpoint(UNFINISHED) if weights == "trained" else shaken(std=0.02)
    far = distances(network, hard_scenes(600))
    early, late = far[10:50].mean(0), far[-100:].mean(0)
    assert (late <= 1.05 * early + 0.2).all(), (early, late)


def test_the_direct_loop_forgets() -> None:
    """With a gate as open as it goes and nothing else, a wrong answer fades."""
    network = StreamNetwork(TINY_STREAM).eval()
    with torch.no_grad():
        network.stream_generator.gate.bias.fill_(100.0)
    frame = hard_scenes(1)[:, 1]
    previous, state = frame, torch.full((1, TINY_STREAM.state, 16, 16), 255, dtype=torch.uint8)
    levels = []
    with torch.inference_mode():
        for _ in range(120):
            hr, previous, state = network(frame, previous, state, torch.zeros(1, 1))
            levels.append(float((hr[0].int() - bicubic(frame)[0].int()).abs().float().mean()))
    assert levels[0] > 40
    assert levels[-1] < 12  # of 8 bits, where rounding ends it: (1 - 0.95) x 10 levels is half a level
    assert MAX_GATE < 1


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a repository that ``build-stream`` has filled, and its work folder."""
    folder = tmp_path_factory.mktemp("stream")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "LEVELS", 1)  # of the flow's pyramid: each takes the exporter seconds
        patch.setattr(sequences, "FRAMES", 12)
        patch.setattr(sample, "CALIBRATION_CLIPS", (sample.CLIP,))
        patch.setitem(STREAM_WIDTHS, TINY_STREAM.name, TINY_STREAM)
        save_checkpoint(shaken(), folder / "tiny.safetensors", {})
        arguments = ["--checkpoint", folder / "tiny.safetensors", "--repository", folder / "models"]
        command = ["build-stream", *arguments, "--build", folder / "build"]
        result = CliRunner().invoke(main, list(map(str, command)))
        assert result.exit_code == 0, result.output
    return folder


def stages(built: Path, precision: str = FP32) -> dict[str, Path]:
    chosen = {stage.name: stage_path(built / "build", stage, precision) for stage in spec.STREAM_STAGES}
    return {**chosen, spec.PIXEL_SHUFFLE.name: stage_path(built / "build", spec.PIXEL_SHUFFLE)}


def test_exported_stages_agree_frame_by_frame(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sequence starts with a state of one pixel, the second with anything else."""
    monkeypatch.setattr(stream, "LEVELS", 1)
    frames = moving_scene(6)
    expected = run(shaken(), frames, resets=(3,))
    runner = StreamRunner(stages(built))
    for t, lr in enumerate(frames):
        if t == 3:
            runner.reset()
        difference = np.abs(runner.upscale(lr.numpy()).astype(int) - expected[t].numpy())
        assert difference.max() <= 2
        assert (difference > 0).mean() < 0.02


def test_tensorrt_has_every_operator(built: Path) -> None:
    for path in stages(built).values():
        operators = {node.op_type for node in onnx.load(path).graph.node}
        assert operators <= KNOWN_OPERATORS, operators - KNOWN_OPERATORS


def test_int8_has_its_convolutions_in_8_bits_and_the_answers_of_fp32(built: Path) -> None:
    path = stages(built, INT8)[spec.STREAM_GENERATOR.name]
    model = onnx.load(path)
    made = {output: node for node in model.graph.node for output in node.output}
    layers = [node for node in model.graph.node if node.op_type == "Conv"]
    in_8_bits = [made[n.input[1]].op_type == "DequantizeLinear" for n in layers if n.input[1] in made]
    assert sum(in_8_bits) == 5  # stem, fuse, two of the block, head
    assert parent_digest(path) == sha256(stages(built)[spec.STREAM_GENERATOR.name])
    runners = [StreamRunner(stages(built, precision)) for precision in (FP32, INT8)]
    for lr in moving_scene(12):
        fp32, int8 = (runner.upscale(lr.numpy()) for runner in runners)
        assert psnr_db(int8, fp32, peak=255) > 35


def test_the_repository_has_all_of_the_ensemble(built: Path) -> None:
    models = built / "models"
    for stage in (*spec.STREAM_STAGES, spec.PIXEL_SHUFFLE):
        precision = INT8 if stage in spec.STREAM_STAGES else FP32
        served = models / stage.name / "1" / "model.onnx"
        assert served.read_bytes() == stage_path(built / "build", stage, precision).read_bytes()
    text = (models / spec.STREAM_ENSEMBLE.name / "config.pbtxt").read_text()
    config = text_format.Parse(text, pb.ModelConfig())
    assert [step.model_name for step in config.ensemble_scheduling.step] == [
        "stream_align", "stream_generator", "pixel_shuffle",
    ]  # fmt: skip
    published = {name: value.string_value for name, value in config.parameters.items()}
    assert published["weights_name"] == "tiny" and published["precision"] == "int8"
    write_configs(models)  # which keeps what is published
    assert (models / spec.STREAM_ENSEMBLE.name / "config.pbtxt").read_text() == text


def test_a_precision_that_costs_too_much_is_not_installed(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An INT8 generator of other weights stands for one that went wrong."""
    monkeypatch.setattr(sequences, "FRAMES", 6)
    wrong = {**stages(built, INT8), spec.STREAM_GENERATOR.name: stages(built)[spec.STREAM_GENERATOR.name]}
    model = onnx.load(wrong[spec.STREAM_GENERATOR.name])
    head = next(tensor for tensor in model.graph.initializer if tensor.name == "head.weight")
    head.CopyFrom(onnx.numpy_helper.from_array(-8 * onnx.numpy_helper.to_array(head), head.name))
    onnx.save(model, tmp_path / "wrong.onnx")
    wrong[spec.STREAM_GENERATOR.name] = tmp_path / "wrong.onnx"
    with pytest.raises(ExportError, match=r"loses .* dB \(at most 0.1\). Nothing was installed"):
        Report(tmp_path).check("precisions", [sequences.compare_precision(INT8, wrong, stages(built))])


def test_start_from_the_committed_student() -> None:
    network = from_window_network(
        load_checkpoint(CHECKPOINTS / "mst_gan_student.safetensors").generator, STREAM
    )
    frames = moving_scene(4)
    assert len(run(network, frames)) == 4
