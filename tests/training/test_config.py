"""Recipes: what is committed is read as documented, the command line overrides, faults are one line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from export.__main__ import main
from export.checkpoint import FOLDER, load_checkpoint
from export.errors import ExportError
from export.training.config import ADVERSARIAL, RECIPES, Config, make_config, read_recipe
from export.training.sequence_commands import train_sequences
from export.training.train_all import read_stages

OF_CHECKPOINTS = {path.stem.removeprefix("mst_gan_"): path for path in FOLDER.glob("*.safetensors")}


@pytest.mark.parametrize("name", sorted(OF_CHECKPOINTS))
def test_every_checkpoint_has_a_recipe_that_its_card_names(name: str) -> None:
    recipe = read_recipe(name)
    if "sequences" in recipe:
        widths = recipe["sequences"]["widths"]
    else:
        widths = make_config(recipe, {"teacher": "x"} if recipe.get("augmented_teacher") else {}).widths
    trunk = load_checkpoint(OF_CHECKPOINTS[name]).widths.name
    assert widths in (trunk, f"{trunk}_trunk")
    assert f"(../training/recipes/{name}.toml)" in (FOLDER / f"mst_gan_{name}.md").read_text()


@pytest.mark.parametrize("card", sorted(FOLDER.glob("*.md")), ids=lambda path: path.stem)
def test_a_card_is_short_and_has_one_picture(card: Path) -> None:
    text = card.read_text()
    assert len(text.splitlines()) <= 60
    assert text.count("![") <= 1
    for heading in ("## Scores", "## Recipe", "## Limits", "## Data"):
        assert heading in text


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_committed_recipe_is_valid(path: Path) -> None:
    recipe = read_recipe(path.stem)
    if "stages" in recipe:
        read_stages(recipe, {}, path.name)
    elif "sequences" in recipe:
        options = {option.name for option in train_sequences.params}
        assert set(recipe["sequences"]) <= options
    else:
        make_config(recipe, {"teacher": "x"})


def test_the_student_is_what_its_card_documents() -> None:
    config = make_config(read_recipe("student"), {"teacher": "trunk.safetensors", "seed": 7})
    documented = ("student", "mse", 10.0, True, 0.45, 1e-3, 100, 52.0)
    found = (
        config.widths, config.pixel_loss, config.teacher_weight, config.augmented_teacher, config.photo_share,
        config.lr, config.warmup, config.minutes,
    )  # fmt: skip
    assert found == documented
    assert config.seed == 7


def test_later_layers_override_and_defaults_follow_the_objective() -> None:
    assert make_config() == Config()
    assert make_config({"lr": 1e-3, "seed": 1}, {"lr": 1}).lr == 1.0
    assert make_config({"init": "a"}).lr == 4e-4
    assert make_config({"init": "a", "lr": 1e-5}).lr == 1e-5
    adversarial = make_config({"objective": "adversarial", "init": "a", "optimizer": "muon"})
    assert adversarial.optimizer == "muon"
    assert (adversarial.lr, adversarial.temporal_weight) == (
        ADVERSARIAL["lr"],
        ADVERSARIAL["temporal_weight"],
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lerning_rate": 1.0}, "found 'lerning_rate'; they are widths"),
        ({"warm_up": 1}, "found 'warm_up'; did you mean 'warmup'?"),
        ({"steps": 1.5}, "expected steps in a.toml to be an integer, found 1.5"),
        ({"steps": True}, "expected steps in a.toml to be an integer, found True"),
        ({"steps": 0}, "expected steps in a.toml to be at least 1, found 0"),
        ({"minutes": 0}, "expected minutes in a.toml to be above 0, found 0"),
        ({"photo_share": 2}, "expected photo_share in a.toml to be at most 1, found 2"),
        ({"lr": "1e-3"}, "expected lr in a.toml to be a number, found '1e-3'"),
        ({"widths": 3}, "expected widths in a.toml to be a string, found 3"),
        ({"bf16": 1}, "expected bf16 in a.toml to be true or false, found 1"),
        ({"pixel_loss": "l1"}, "expected pixel_loss in a.toml to be one of charbonnier, charbonnier_mse"),
        ({"augmented_teacher": True}, "expected a teacher with augmented_teacher in a.toml, found none"),
    ],
)
def test_faults_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ExportError, match=re.escape(message)) as caught:
        make_config(settings, source="a.toml")
    assert "\n" not in str(caught.value)


def run_train(folder: Path, *arguments: object) -> str:
    (folder / "names.txt").write_text("a.mp4\n")
    command = [
        "train", "--clips", folder, "--validation", folder / "names.txt", "--out", folder / "run", *arguments,
    ]  # fmt: skip
    result = CliRunner().invoke(main, list(map(str, command)))
    assert result.exit_code == 1, result.output
    assert result.output.strip().count("\n") == 0
    return result.output


def test_the_command_reads_recipes_and_says_what_is_wrong(tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text("lr = 1e-3\nsteps = 'many'\n")
    assert "expected steps in recipe" in run_train(tmp_path, "--recipe", mine)
    assert "expected a.mp4 in" in run_train(
        tmp_path, "--recipe", mine, "--steps", 3
    )  # overridden: the next fault
    mine.write_text("lr = \n")
    assert "to be TOML, found something else: Invalid value (at line 1" in run_train(
        tmp_path, "--recipe", mine
    )
    mine.write_text("learning_rate = 1\n")
    assert "found 'learning_rate'" in run_train(tmp_path, "--recipe", mine)
    assert "found no file; pass a path, or one of all, baseline" in run_train(tmp_path, "--recipe", "studnet")
    assert "expected a recipe of one run, found stages" in run_train(tmp_path, "--recipe", "all")
    assert "pass --teacher" in run_train(tmp_path, "--recipe", "student")
    assert "expected --widths to be one of" in run_train(tmp_path, "--widths", "huge")


@pytest.mark.parametrize("command", ["train", "prune", "train-all"])
def test_help_lists_every_setting_with_its_default(command: str) -> None:
    text = " ".join(CliRunner().invoke(main, [command, "--help"]).output.split())
    assert "--decay-share FLOAT Share of the run, its end" in text
    assert "[recipe's, or 0.4]" in text
    assert "--bf16 / --fp32" in text
    assert ("--pixel-loss" in text) == (command != "prune")
    assert ("--widths" in text) == (command == "train")
