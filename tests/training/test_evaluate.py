"""Scores, tables and pictures as promised; what cannot be measured is said; faults are named."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from made_up_lpips import write_weights
from PIL import Image
from tiny_network import TINY, shake

from export.__main__ import main
from export.checkpoint import save_checkpoint
from export.data.clips import SEGMENT, load_folder
from export.data.evaluation_clips import find_sources, load_evaluation_clip
from export.data.sample import sample_clip
from export.errors import ExportError
from export.metrics import vmaf as vmaf_module
from export.metrics.collage import COLUMN_PX, CROP, lossiest_crop
from export.metrics.lpips import NAME
from export.metrics.psnr_ssim import psnr
from export.network import MstGan
from export.training.curves import draw_curves
from export.training.evaluate import MetricConfig, Metrics, Score, evaluate_clip, evaluate_segments, mean
from export.training.report import differences, markdown

pytestmark = pytest.mark.usefixtures("tiny_widths")


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


def score(clip: str, psnr_db: float, lpips: float | None, single: float | None = None) -> Score:
    bicubic = Metrics(25.0, 0.7, lpips and 2 * lpips)
    return Score(clip, 5, Metrics(psnr_db, 0.8, lpips), bicubic, single)


def test_tables_stand_networks_side_by_side() -> None:
    scores = {
        "first": [score("a", 27.0, 0.1, 26.5), score("b", 29.0, 0.3, 28.5)],
        "second": [score("a", 26.0, 0.2, 25.5), score("b", 26.0, 0.2, 25.5)],
    }
    assert mean(scores["first"]) == Score("mean", 10, Metrics(28.0, 0.8, 0.2), Metrics(25.0, 0.7, 0.4), 27.5)
    text = markdown(scores)
    for line in (
        "| bicubic | 25.00 | 0.7000 | 0.400 |  |  |  |",
        "| first | 28.00 | 0.8000 | 0.200 | +3.00 | +2.00 to +4.00 | +0.50 |",
        "| a | 5 | 25.00 | +2.00 | +1.00 |",
        f"| {NAME} | bicubic | first | second |",
        "| b | 0.600 | 0.300 | 0.200 |",
    ):
        assert line in text.splitlines()
    assert "VMAF" not in text and "tOF" not in text
    alone = {"first": [score("a", 27.0, None)]}
    assert "| first | 27.00 | 0.8000 | +2.00 | one clip |" in markdown(alone).splitlines()
    assert NAME not in markdown(alone) and "verdict" not in markdown(alone)
    assert "PSNR-RGB" in markdown(alone, "rgb")


def test_a_difference_is_one_beyond_its_interval_over_clips() -> None:
    """Clips differ by 10 dB, the networks by 0.1 dB on each: paired, that is seen."""
    names = "abcdef"
    scores = {
        "first": [score(name, 20.0 + 2 * i, 0.1) for i, name in enumerate(names)],
        "second": [
            score(name, 20.1 + 2 * i + 0.01 * i, 0.1 + (-1) ** i * 0.01) for i, name in enumerate(names)
        ],
    }
    found = {d.metric: d for d in differences(scores)}
    psnr_y = found["PSNR-Y, dB"]
    assert (psnr_y.network, psnr_y.reference) == ("second", "first")
    assert psnr_y.mean == pytest.approx(0.125)
    assert psnr_y.interval is not None and 0.1 < psnr_y.interval[0] < 0.125 < psnr_y.interval[1] < 0.15
    assert psnr_y.is_significant
    assert not found[NAME].is_significant
    assert not found["SSIM-Y"].is_significant  # equal: the interval is zero
    lines = markdown(scores).splitlines()
    assert any(
        line.startswith("| second | PSNR-Y, dB | +0.1") and line.endswith("a difference |") for line in lines
    )
    assert any(line.startswith(f"| second | {NAME} |") and line.endswith("no difference |") for line in lines)


def test_of_a_single_clip_nothing_is_a_difference() -> None:
    scores = {"first": [score("a", 20.0, None)], "second": [score("a", 30.0, None)]}
    assert not any(d.is_significant for d in differences(scores))
    assert differences({"first": scores["first"]}) == []


@pytest.fixture(scope="module")
def pan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one sequence of eight images, 152x150, that moves by a pixel per frame."""
    folder = tmp_path_factory.mktemp("footage")
    (folder / "pan").mkdir()
    with av.open(str(sample_clip())) as container:
        frame = next(islice(container.decode(video=0), 1)).to_ndarray(format="rgb24")
    for index in range(8):
        Image.fromarray(frame[40:192, 100 + index : 250 + index]).save(folder / "pan" / f"{index}.png")
    (folder / "names.txt").write_text("pan\n")
    return folder


def test_untrained_network_scores_as_bicubic(footage: Path, tmp_path: Path) -> None:
    clips = load_folder(footage, tmp_path, min_side=64)
    scores = evaluate_segments(MstGan(TINY).eval(), clips[:2], segments=1)
    assert scores[0].frames == SEGMENT - 2
    assert mean(scores).gain_db == 0
    assert mean(scores).network == mean(scores).bicubic
    assert mean(scores).network.psnr_db > 20


def test_every_frame_counts_and_borders_do_not(pan: Path, tmp_path: Path) -> None:
    """150 hr pixels are 37 lr pixels, no multiple of 4: padded as the client does, and cropped again."""
    (source,) = find_sources(pan)
    clip = load_evaluation_clip(source, tmp_path)
    assert clip.truth.shape == (8, 152, 148, 3)
    network = {"": MstGan(TINY).eval()}
    whole = evaluate_clip(network, clip)[""]
    inner = evaluate_clip(network, clip, MetricConfig(border=40, temporal_border=3))[""]
    assert (whole.frames, inner.frames) == (8, 2)
    assert whole.network == whole.bicubic
    assert inner.network != whole.network
    assert whole.single_psnr_db is None
    with pytest.raises(ExportError, match=r"pan: expected frames between temporal borders of 4, found 8"):
        evaluate_clip(network, clip, MetricConfig(temporal_border=4))


def test_a_window_at_either_end_repeats_its_edge_frame(pan: Path, tmp_path: Path) -> None:
    (source,) = find_sources(pan)
    clip = load_evaluation_clip(source, tmp_path, frames=3)
    network = shake(MstGan(TINY)).eval()
    seen: list[np.ndarray] = []
    hook = network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].numpy()))
    evaluate_clip({"": network}, clip, MetricConfig(single=True))
    hook.remove()
    lr = clip.lr
    expected = [[0, 0, 1], [0, 1, 2], [1, 2, 2], [0, 0, 0], [1, 1, 1], [2, 2, 2]]  # windows, then one frame
    for window, frames in zip(seen, expected, strict=True):
        assert np.array_equal(window[0, :, :38, :37], lr[frames])


def run_evaluate(clips: Path, out: Path, *arguments: object) -> Result:
    command = ["evaluate", "--clips", clips, "--cache", out / "cache", "--out", out, *arguments]
    return CliRunner().invoke(main, list(map(str, command)))


def test_two_checkpoints_with_every_metric(pan: Path, tmp_path: Path) -> None:
    checkpoints = [tmp_path / run / "ema.safetensors" for run in ("a", "b")]
    for path in checkpoints:
        path.parent.mkdir()
        save_checkpoint(MstGan(TINY), path, {})
    write_weights(tmp_path)
    log = tmp_path / "a" / "log.csv"
    log.write_text("step,pixel,step_s,gain_db\n50,0.5,1.0,\n100,0.25,1.0,0.125\n150,")
    result = run_evaluate(
        pan, tmp_path / "out", "--frames", 4, "--names", pan / "names.txt", "--one-frame",
        "--checkpoint", checkpoints[0], "--checkpoint", checkpoints[1], "--weights", tmp_path, "--log", log,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert (report["degradation"], report["border"], report["channels"]) == ("bi", 4, "y")
    assert list(report["scores"]) == ["a/ema", "b/ema"]
    row = report["scores"]["b/ema"][0]
    assert row["frames"] == 4
    assert row["network"] == row["bicubic"]  # untrained
    assert row["network"]["tof_px"] > 0
    assert 0 < row["network"]["vmaf"] < 100
    assert row["network"]["lpips"] > 0
    assert row["single_psnr_db"] == row["network"]["psnr_db"]
    assert [d["mean"] for d in report["differences"]] == [0] * 5
    assert (tmp_path / "out" / "scores.md").read_text().strip() in result.output
    assert Image.open(tmp_path / "out" / "pan.png").size[0] == 4 * COLUMN_PX
    assert Image.open(tmp_path / "out" / "curves.png").size[0] > 500


def test_what_cannot_be_measured_is_left_out_and_said(
    pan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(vmaf_module, "PACKAGE", "no_such_package")
    save_checkpoint(MstGan(TINY), tmp_path / "tiny.safetensors", {})
    arguments = ("--checkpoint", tmp_path / "tiny.safetensors", "--no-tof", "--frames", 2)
    result = run_evaluate(pan, tmp_path, *arguments, "--degradation", "bd")
    assert result.exit_code == 0, result.output
    assert f"{NAME} is left out: pass --weights FOLDER" in caplog.text
    assert "VMAF is left out: it needs the package no_such_package" in caplog.text
    assert not any(word in result.output for word in ("| VMAF", "tOF", "| LPIPS"))
    report = json.loads((tmp_path / "scores.json").read_text())
    assert report["degradation"] == "bd"
    assert report["scores"]["tiny"][0]["network"]["vmaf"] is None

    (tmp_path / "gone.txt").write_text("gone\n")
    for wrong, message in (
        (
            ("--degradation", "bx"),
            "expected a degradation among bi, bd, real or x264-CRF",
        ),
        (("--names", tmp_path / "gone.txt"), "expected gone in"),
        (("--temporal-border", 1), "expected frames between temporal borders of 1, found 2 in all"),
        (("--border", 4, "--lr-folder", "BIx4"), "expected the truth of pan in a folder named GT"),
        (("--checkpoint", tmp_path / "tiny.safetensors"), "expected checkpoints of different names"),
    ):
        refused = run_evaluate(pan, tmp_path, *arguments, *wrong)
        assert refused.exit_code == 1, refused.output
        assert message in refused.output


def test_the_protocol_is_an_option(pan: Path, tmp_path: Path) -> None:
    save_checkpoint(MstGan(TINY), tmp_path / "tiny.safetensors", {})
    result = run_evaluate(
        pan, tmp_path, "--checkpoint", tmp_path / "tiny.safetensors", "--no-tof", "--no-vmaf",
        "--channels", "rgb", "--border", 0, "--temporal-border", 3,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "PSNR-RGB" in result.output
    report = json.loads((tmp_path / "scores.json").read_text())
    row = report["scores"]["tiny"][0]
    assert row["frames"] == 2
    (source,) = find_sources(pan)
    clip = load_evaluation_clip(source, tmp_path / "cache")
    answers = [MstGan(TINY).eval()(window_of(clip.lr, t))[0, :152, :148].detach().numpy() for t in (3, 4)]
    expected = [
        psnr(a, clip.truth[t], channels="rgb", border=0) for a, t in zip(answers, (3, 4), strict=True)
    ]
    assert row["network"]["psnr_db"] == pytest.approx(np.mean(expected), abs=1e-6)


def window_of(lr: np.ndarray, t: int) -> torch.Tensor:
    frames = np.pad(lr[t - 1 : t + 2], ((0, 0), (0, 2), (0, 3), (0, 0)), "edge")
    return torch.from_numpy(frames)[None]


def test_curves_need_a_log(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"expected a training log at .*, found no file"):
        draw_curves([tmp_path / "log.csv"], tmp_path / "curves.png")
    (tmp_path / "log.csv").write_text("step,step_s\n50,1.0\n")
    with pytest.raises(ExportError, match=r"expected columns of numbers over steps in .*, found none"):
        draw_curves([tmp_path / "log.csv"], tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()
