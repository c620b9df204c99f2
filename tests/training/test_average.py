"""The mean of several networks' weights, and what lies between two."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from tiny_network import LIGHT, TINY, shake

from export.__main__ import main
from export.checkpoint import load_checkpoint, save_checkpoint
from export.network import WIDTHS, MstGan

pytestmark = pytest.mark.usefixtures("tiny_widths")


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


def test_interpolation_lies_between_two_networks(tmp_path: Path) -> None:
    paths = [tmp_path / f"{seed}.safetensors" for seed in range(2)]
    first, second = (saved(path, seed).state_dict() for seed, path in enumerate(paths))
    out = tmp_path / "between.safetensors"
    for alpha in (0, 0.25, 1):
        arguments = ["interpolate", *map(str, paths), "--alpha", str(alpha), "--out", str(out)]
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, result.output
        for name, value in load_checkpoint(out).state_dict().items():
            expected = (1 - alpha) * first[name] + alpha * second[name]
            assert torch.allclose(value, expected, rtol=1e-3, atol=1e-6), name
    with safe_open(out, "pt") as file:
        recipe = json.loads(file.metadata()["recipe"])
    assert recipe == {"interpolation_of": [path.name for path in paths], "alpha": 1}
    result = CliRunner().invoke(main, ["interpolate", *map(str, paths), "--alpha", "1.5", "--out", str(out)])
    assert result.exit_code != 0


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
