"""Scores: every metric against a second implementation, tables and pictures as promised, faults named."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner, Result
from PIL import Image
from tiny_network import TINY

from export.__main__ import main
from export.checkpoint import save_checkpoint
from export.data.sample import sample_clip
from export.errors import ExportError
from export.metrics import lpips as lpips_module
from export.metrics import vmaf as vmaf_module
from export.metrics.collage import COLUMN_PX, CROP, lossiest_crop
from export.metrics.lpips import NAME, Lpips, load_lpips
from export.metrics.psnr_ssim import luma, ssim_y
from export.metrics.tof import flows, tof
from export.metrics.vmaf import vmaf
from export.network import MstGan
from export.training.curves import draw_curves
from export.training.evaluation import Measures, Score, mean
from export.training.tables import markdown

pytestmark = pytest.mark.usefixtures("tiny_widths")


@pytest.fixture(scope="module")
def frames() -> list[np.ndarray]:
    with av.open(str(sample_clip())) as container:
        return [f.to_ndarray(format="rgb24") for f in islice(container.decode(video=0), 3)]


def blurred(frame: np.ndarray) -> np.ndarray:
    images = torch.from_numpy(frame).permute(2, 0, 1).float()[None]
    small = F.interpolate(images, scale_factor=1 / 4, mode="bicubic", antialias=True)
    large = F.interpolate(small, size=frame.shape[:2], mode="bicubic")
    return large[0].clamp(0, 255).round().byte().permute(1, 2, 0).numpy()


def test_ssim_is_wangs(frames: list[np.ndarray]) -> None:
    """Wang et al. 2004: an 11x11 Gaussian window of sigma 1.5, where it fits, K1 = 0.01, K2 = 0.03."""
    image, truth = (
        torch.from_numpy(luma(frame))[None, None, 4:-4, 4:-4] for frame in (blurred(frames[0]), frames[0])
    )
    x = torch.arange(-5, 6, dtype=torch.float64)
    line = torch.exp(-(x**2) / (2 * 1.5**2))
    window = torch.outer(line, line)[None, None] / line.sum() ** 2

    def local(values: torch.Tensor) -> torch.Tensor:
        return F.conv2d(values, window)

    m1, m2 = local(image), local(truth)
    v1, v2 = local(image**2) - m1**2, local(truth**2) - m2**2
    covariance = local(image * truth) - m1 * m2
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    expected = ((2 * m1 * m2 + c1) * (2 * covariance + c2)) / ((m1**2 + m2**2 + c1) * (v1 + v2 + c2))
    assert ssim_y(blurred(frames[0]), frames[0]) == pytest.approx(expected.mean().item(), abs=1e-6)


def waves(index: int, shape: torch.Size, frequency: float, scale: float) -> torch.Tensor:
    values = (torch.arange(shape.numel(), dtype=torch.float64) * (frequency + index)).sin() * scale
    return values.float().view(shape)


def write_weights(folder: Path) -> None:
    """Made-up weights in the published layouts: sines, which no generator of random numbers can change."""
    lpips = Lpips()
    backbone = {
        name: waves(i, p.shape, 0.7, (3 / p[0].numel()) ** 0.5)
        for i, (name, p) in enumerate(lpips.backbone.named_parameters())
    }
    heads = {f"lin{i}.model.1.weight": waves(i, p.shape, 1.3, 1).abs() for i, p in enumerate(lpips.heads)}
    torch.save(backbone, folder / lpips_module.BACKBONE_FILE)
    torch.save(heads, folder / lpips_module.HEADS_FILE)


def test_lpips_equals_its_authors_package(tmp_path: Path) -> None:
    """0.29077396 is what lpips 0.1.4 (torchvision 0.29) answers with these weights and images."""
    write_weights(tmp_path)
    lpips = load_lpips(tmp_path)
    y, x = torch.meshgrid(torch.arange(48.0), torch.arange(64.0), indexing="ij")
    image = torch.stack([(x * y / 50 + k).sin() * 0.5 + 0.5 for k in range(3)])[None]
    other = image.roll(2, -1) ** 2
    assert lpips(image, other).item() == pytest.approx(0.29077396, abs=1e-5)
    assert lpips(image, image).item() == 0
    byte_frames = [(i[0].permute(1, 2, 0) * 255).round().byte().numpy() for i in (image, other)]
    assert lpips.of_frames(*byte_frames) == pytest.approx(0.2908, abs=2e-3)


def test_lpips_names_what_is_wrong_with_its_weights(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"expected weights of LPIPS .* at .*, found no file"):
        load_lpips(tmp_path)
    write_weights(tmp_path)
    heads = torch.load(tmp_path / lpips_module.HEADS_FILE, weights_only=True)
    torch.save({**heads, "lin2.model.1.weight": torch.zeros(1, 3, 1, 1)}, tmp_path / lpips_module.HEADS_FILE)
    with pytest.raises(ExportError, match=r"found other keys or shapes: .*\[1, 256, 1, 1\]"):
        load_lpips(tmp_path)
    (tmp_path / lpips_module.HEADS_FILE).write_text("not weights")
    with pytest.raises(ExportError, match="to be a PyTorch state dict, found something else"):
        load_lpips(tmp_path)


def test_tof_is_the_length_of_the_missing_motion() -> None:
    noise = torch.rand(1, 3, 20, 24, generator=torch.Generator().manual_seed(0))
    picture = F.interpolate(noise, scale_factor=8, mode="bicubic")[0].clamp(0, 1)
    still = (picture * 255).byte().permute(1, 2, 0).numpy()
    moving = [np.roll(still, (t, t), (0, 1))[8:-8, 8:-8] for t in range(3)]
    true_flows = flows(moving)
    assert tof(moving, true_flows) == 0
    # By a pixel down and a pixel to the right: sqrt(2), not 1 as if the axes were averaged.
    assert tof([moving[0]] * 3, true_flows) == pytest.approx(2**0.5, abs=0.15)


def test_vmaf_falls_with_blur(frames: list[np.ndarray]) -> None:
    same, blur = vmaf(frames, frames), vmaf([blurred(f) for f in frames], frames)
    assert same > 95
    # vmaf-torch 1.1.0, written from the same paper, is within 0.1 of libvmaf on such frames.
    assert 50 < blur < 90


def test_vmaf_tells_why_it_failed(frames: list[np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vmaf_module, "MODEL", "no_such_model")
    with pytest.raises(ExportError, match=r"exit status \d+: (.|\n)*--no-vmaf"):
        vmaf(frames, frames)


def test_the_detail_is_where_something_moves() -> None:
    truth = np.zeros((300, 400, 3), np.uint8)
    image = truth.copy()
    image[10:40, 10:40] = 200  # the larger error, but at rest
    image[200:220, 300:320] = 100
    moving = np.zeros((300, 400), bool)
    moving[195:225, 295:325] = True

    def holds(corner: tuple[int, int], y: int, x: int) -> bool:
        return corner[0] <= y < corner[0] + CROP[0] and corner[1] <= x < corner[1] + CROP[1]

    assert holds(lossiest_crop(image, truth), 25, 25)
    assert holds(lossiest_crop(image, truth, moving), 210, 310)
    assert holds(lossiest_crop(image, truth, np.zeros_like(moving)), 25, 25)


def score(clip: str, psnr_db: float, lpips: float | None) -> Score:
    bicubic = Measures(25.0, 0.7, lpips and 2 * lpips)
    return Score(clip, 5, Measures(psnr_db, 0.8, lpips), bicubic, psnr_db - 0.5)


def test_tables_stand_networks_side_by_side() -> None:
    scores = {
        "first": [score("a", 27.0, 0.1), score("b", 29.0, 0.3)],
        "second": [score("a", 26.0, 0.2), score("b", 26.0, 0.2)],
    }
    assert mean(scores["first"]) == Score(
        "mean", 10, Measures(28.0, 0.8, 0.2), Measures(25.0, 0.7, 0.4), 27.5
    )
    text = markdown(scores)
    for line in (
        "| bicubic | 25.00 | 0.7000 | 0.400 |  |  |",
        "| first | 28.00 | 0.8000 | 0.200 | +3.00 dB | +0.50 dB |",
        "| a | 5 | 25.00 / 0.7000 | 27.00 / 0.8000 | +2.00 dB | +0.50 dB "
        "| 26.00 / 0.8000 | +1.00 dB | +0.50 dB |",
        f"| {NAME} | bicubic | first | second |",
        "| b | 0.600 | 0.300 | 0.200 |",
    ):
        assert line in text.splitlines()
    assert "VMAF" not in text and "tOF" not in text
    assert NAME not in markdown({"first": [score("a", 27.0, None)]})


@pytest.fixture(scope="module")
def footage(tmp_path_factory: pytest.TempPathFactory, frames: list[np.ndarray]) -> Path:
    """A folder with one sequence of eight images that moves by a pixel per frame."""
    folder = tmp_path_factory.mktemp("footage")
    (folder / "pan").mkdir()
    for index in range(8):
        Image.fromarray(frames[0][40:192, 100 + index : 252 + index]).save(folder / "pan" / f"{index}.png")
    (folder / "names.txt").write_text("pan\n")
    return folder


def run_evaluate(footage: Path, out: Path, *arguments: object) -> Result:
    command = [
        "evaluate", "--clips", footage, "--validation", footage / "names.txt", "--cache", out / "cache",
        "--segments", 1, "--out", out, *arguments,
    ]  # fmt: skip
    return CliRunner().invoke(main, list(map(str, command)))


def test_two_checkpoints_with_every_instrument(footage: Path, tmp_path: Path) -> None:
    checkpoints = [tmp_path / run / "ema.safetensors" for run in ("a", "b")]
    for path in checkpoints:
        path.parent.mkdir()
        save_checkpoint(MstGan(TINY), path, {})
    write_weights(tmp_path)
    log = tmp_path / "a" / "log.csv"
    log.write_text("step,pixel,step_s,gain_db\n50,0.5,1.0,\n100,0.25,1.0,0.125\n150,")
    result = run_evaluate(
        footage, tmp_path / "out",
        "--checkpoint", checkpoints[0], "--checkpoint", checkpoints[1], "--weights", tmp_path, "--log", log,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert report["degradation"] == "bi"
    assert list(report["scores"]) == ["a/ema", "b/ema"]
    row = report["scores"]["b/ema"][0]
    assert row["network"] == row["bicubic"]  # untrained
    assert row["network"]["tof_px"] > 0
    assert 0 < row["network"]["vmaf"] < 100
    assert row["network"]["lpips"] > 0
    assert (tmp_path / "out" / "scores.md").read_text().strip() in result.output
    assert Image.open(tmp_path / "out" / "pan.png").size[0] == 4 * COLUMN_PX
    assert Image.open(tmp_path / "out" / "curves.png").size[0] > 500


def test_what_cannot_be_measured_is_left_out_and_said(
    footage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(vmaf_module, "PACKAGE", "no_such_package")
    save_checkpoint(MstGan(TINY), tmp_path / "tiny.safetensors", {})
    arguments = ("--checkpoint", tmp_path / "tiny.safetensors", "--no-tof")
    result = run_evaluate(footage, tmp_path, *arguments, "--degradation", "bd")
    assert result.exit_code == 0, result.output
    assert f"{NAME} is left out: pass --weights FOLDER" in caplog.text
    assert "VMAF is left out: it needs the package no_such_package" in caplog.text
    assert not any(word in result.output for word in ("| VMAF", "tOF", "| LPIPS"))
    report = json.loads((tmp_path / "scores.json").read_text())
    assert report["degradation"] == "bd"
    assert report["scores"]["tiny"][0]["network"]["vmaf"] is None

    for wrong, message in (
        (("--degradation", "bx"), "expected a degradation among bi, bd, real, found 'bx'"),
        (("--segments", "0"), "expected --segments of at least 1, found 0"),
        (("--checkpoint", tmp_path / "tiny.safetensors"), "expected checkpoints of different names"),
    ):
        refused = run_evaluate(footage, tmp_path, *arguments, *wrong)
        assert refused.exit_code == 1
        assert message in refused.output


def test_curves_need_a_log(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"expected a training log at .*, found no file"):
        draw_curves([tmp_path / "log.csv"], tmp_path / "curves.png")
    (tmp_path / "log.csv").write_text("step,step_s\n50,1.0\n")
    with pytest.raises(ExportError, match=r"expected columns of numbers over steps in .*, found none"):
        draw_curves([tmp_path / "log.csv"], tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()
