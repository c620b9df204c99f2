"""A teacher that sees every window another way round, and the mean of several networks."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from safetensors import safe_open
from tiny_network import LIGHT, TINY, frames_of, shake

from export.__main__ import main
from export.checkpoint import load_checkpoint, save_checkpoint
from export.network import WIDTHS, MstGan
from export.training.commands import PIXEL_LOSS_NAMES
from export.training.imitation import Imitation
from export.training.losses import LUMA_WEIGHT, PIXEL_LOSSES, SQUARED_WEIGHT, luminous, mixed

pytestmark = pytest.mark.usefixtures("tiny_widths")


def test_what_a_turned_teacher_answers_is_turned_back() -> None:
    """Untrained it answers bicubic, which does not depend on the view."""
    imitation, frames = Imitation([MstGan(LIGHT)], LIGHT, turned=True), frames_of(16)
    plain, features = Imitation([MstGan(LIGHT)], LIGHT).taught(frames, bf16=False)
    answer, none = imitation.taught(frames, bf16=False)
    assert features is not None
    assert none is None
    assert torch.allclose(answer, plain, atol=1e-4)
    assert imitation.distances(plain, features, (answer, none))[1] == 0


def test_a_turned_teacher_sees_all_views() -> None:
    torch.manual_seed(0)
    imitation = Imitation([shake(MstGan(LIGHT))], LIGHT, turned=True)
    answers, _ = imitation.taught(frames_of(1).expand(160, -1, -1, -1, -1), bf16=False)
    views: list[torch.Tensor] = []
    for answer in answers:
        if all((answer - view).abs().max() > 1e-4 for view in views):
            views.append(answer)
    assert len(views) == 16


def test_pixel_losses_differ_in_what_they_make_of_an_error() -> None:
    truth, off = torch.zeros(1, 48, 8, 8), torch.full((1, 48, 8, 8), 0.1)
    assert tuple(PIXEL_LOSSES) == PIXEL_LOSS_NAMES
    assert PIXEL_LOSSES["charbonnier"](off, truth) == pytest.approx(0.1, rel=1e-3)
    assert PIXEL_LOSSES["squared"](off, truth) == pytest.approx(0.01)
    assert mixed(off, truth) == pytest.approx(0.1 + SQUARED_WEIGHT * 0.01, rel=1e-3)
    assert luminous(off, truth) == pytest.approx(0.1 + LUMA_WEIGHT * 0.01, rel=1e-3)
    green = F.pad(off[:, 16:32], (0, 0, 0, 0, 16, 16))  # sub-pixels of one colour are neighbours
    assert luminous(green, truth) == pytest.approx(0.1 / 3 + LUMA_WEIGHT * 0.01 * 0.587**2, rel=2e-2)


def saved(path: Path, seed: int, widths: str = TINY.name) -> MstGan:
    torch.manual_seed(seed)
    network = shake(MstGan(WIDTHS[widths]))
    save_checkpoint(network, path, {})
    return load_checkpoint(path)


def test_average_is_the_mean_of_all_weights(tmp_path: Path) -> None:
    paths = [tmp_path / f"{seed}.safetensors" for seed in range(3)]
    networks = [saved(path, seed).state_dict() for seed, path in enumerate(paths)]
    out = tmp_path / "mean.safetensors"
    result = CliRunner().invoke(main, ["average", *map(str, paths), "--out", str(out)])
    assert result.exit_code == 0, result.output
    for name, value in load_checkpoint(out).state_dict().items():
        expected = sum(network[name] for network in networks) / 3
        assert torch.allclose(value, expected, rtol=1e-3, atol=1e-6), name
    with safe_open(out, "pt") as file:
        assert json.loads(file.metadata()["recipe"]) == {"average_of": [path.name for path in paths]}


def test_average_refuses_what_has_no_mean(tmp_path: Path) -> None:
    one, other, out = (tmp_path / f"{name}.safetensors" for name in ("one", "other", "out"))
    saved(one, 0)
    saved(other, 1, LIGHT.name)
    for paths, complaint in (([one], "at least two"), ([one, other], f"found '{TINY.name}'")):
        result = CliRunner().invoke(main, ["average", *map(str, paths), "--out", str(out)])
        assert result.exit_code == 1
        assert complaint in result.output
        assert result.output.count("\n") == 1
        assert not out.exists()


def test_average_makes_its_folder_or_says_in_one_line_why_not(tmp_path: Path) -> None:
    paths = [str(tmp_path / f"{seed}.safetensors") for seed in range(2)]
    for seed, path in enumerate(paths):
        saved(Path(path), seed)
    (tmp_path / "file").touch()
    for folder, code in (("new/folder", 0), ("file", 1)):
        out = tmp_path / folder / "mean.safetensors"
        result = CliRunner().invoke(main, ["average", *paths, "--out", str(out)])
        assert result.exit_code == code, result.output
        assert result.output.count("\n") == 1
    assert f"expected to write {out}, found " in result.output


def test_average_leaves_no_half_file_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [tmp_path / f"{seed}.safetensors" for seed in range(2)]
    for seed, path in enumerate(paths):
        saved(path, seed)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    result = CliRunner().invoke(
        main, ["average", *map(str, paths), "--out", str(tmp_path / "mean.safetensors")]
    )
    assert result.exit_code == 1
    assert "No space left on device" in result.output
    assert sorted(tmp_path.iterdir()) == paths
